/*
 * signals.c: wraps the program's signal handlers, so that a thread that polls at user level, or is about
 * to sleep, notices that one ran.
 *
 * The kernel gets one of four functions of ours; which of them it has tells how the program installed its
 * handler (SA_RESTART, SA_SIGINFO), and the table below tells which handler to call.
 *
 * SIGSEGV and SIGBUS have one of ours from the start, since a call of ours that was given a bad address has to
 * say EFAULT (fault.h).  Every other fault is the program's: its handler gets it, with the mask, the stack and
 * the context that the kernel would give it; without one the default action follows, at the same instruction.
 */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>

#include "fault.h"
#include "process.h"
#include "readiness.h"
#include "real.h"

static _Atomic(uintptr_t) handlers[_NSIG];   /* the program's handler of each signal; old ones stay */
static _Atomic uint64_t interrupting;        /* siginterrupt(): bit per signal for which signal() does not restart */

static _Atomic uint64_t once;                /* bit per signal: SA_RESETHAND, which is left to the wrapper: a
                                                handler that is put off comes twice to the kernel */

typedef void signal_action(int, siginfo_t *, void *);

/* ---- handlers that have to wait ---- */

/*
 * The thread has a lock of ours: its signal goes back to the kernel, to come again at the critical section's
 * end with all that the kernel does for a handler (its mask, its stack).  Until then nothing else comes.
 */
static __thread uint64_t mask_before __attribute__((tls_model("initial-exec"))); /* the kernel's form of a mask */

static void put_off(int signal, siginfo_t *info, ucontext_t *context) {
  /* Faults stay: blocked, they would kill.  First of all no other handler comes in between; one that came
   * before this line has noted the mask of this handler, and is overruled by the notes below. */
  uint64_t all = ~(1ull << (SIGSEGV - 1) | 1ull << (SIGBUS - 1) | 1ull << (SIGFPE - 1) | 1ull << (SIGILL - 1) |
                   1ull << (SIGTRAP - 1));
  int error = errno;
  REAL(syscall)(SYS_rt_sigprocmask, SIG_BLOCK, &all, NULL, sizeof all);
  memcpy(&mask_before, &context->uc_sigmask, sizeof mask_before);
  uint64_t meanwhile = mask_before | all;
  memcpy(&context->uc_sigmask, &meanwhile, sizeof meanwhile); /* what the interrupted code goes on with */
  REAL(syscall)(SYS_rt_tgsigqueueinfo, getpid(), REAL(syscall)(SYS_gettid), signal, info);
  atomic_store_explicit(&wait_self()->put_off, true, memory_order_relaxed);
  errno = error;
}

static void put_off_end(void) {
  int error = errno;
  uint64_t mask = mask_before;
  atomic_store_explicit(&wait_self()->put_off, false, memory_order_relaxed);
  atomic_signal_fence(memory_order_seq_cst); /* what waited comes in the next call, and may be put off anew */
  REAL(syscall)(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, sizeof mask);
  errno = error;
}


/* ---- the wrapper ---- */

/* Faults of the program's own: they cannot come while it waits, and some runtimes raise many. */
static bool is_fault(int signal) {
  return signal == SIGSEGV || signal == SIGBUS || signal == SIGFPE || signal == SIGILL || signal == SIGTRAP;
}

/* The faults that a bad address raises. */
static bool is_bad_address(int signal) { return signal == SIGSEGV || signal == SIGBUS; }

/* The kernel raised it for what the thread just did: nobody sent it. */
static bool is_raised(const siginfo_t *info) { return info->si_code > 0; }

static void ran(int signal, siginfo_t *info, void *context, bool restarts) {
  struct wait_thread *self = wait_self();
  bool raised = is_bad_address(signal) && is_raised(info);
  if (raised && fault_recover(context)) return;
  if (__builtin_expect(atomic_load_explicit(&self->critical, memory_order_relaxed) != 0, 0) && !raised) {
    put_off(signal, info, context);
    return;
  }
  if (atomic_load_explicit(&once, memory_order_relaxed) >> (signal - 1) & 1) {
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigaction(signal, &standard, NULL);
  }
  /* Before the handler, which may never return (longjmp).  Same thread as the waiter: relaxed will do. */
  if (!raised) {
    if (!restarts) atomic_fetch_add_explicit(&self->signals_no_restart, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&self->signals, 1, memory_order_relaxed);
    readiness_signal();
  }
  void **recovery = self->recovery; /* the interrupted code's, not the handler's; one that never returns ends it */
  uint8_t faults = self->faults;    /* of its mask; the handler has another one */
  self->recovery = NULL;
  self->faults = 0;
  /* A handler of one argument does not mind the others. */
  ((signal_action *)atomic_load_explicit(&handlers[signal], memory_order_acquire))(signal, info, context);
  self->recovery = recovery;
  self->faults = faults;
}

/* no_icf: told apart by their addresses, though their code is the same in pairs. */
__attribute__((no_icf, noinline)) static void ran_plain(int s, siginfo_t *i, void *c) { ran(s, i, c, false); }
__attribute__((no_icf, noinline)) static void ran_restart(int s, siginfo_t *i, void *c) { ran(s, i, c, true); }
__attribute__((no_icf, noinline)) static void ran_info(int s, siginfo_t *i, void *c) { ran(s, i, c, false); }
__attribute__((no_icf, noinline)) static void ran_info_restart(int s, siginfo_t *i, void *c) { ran(s, i, c, true); }

static signal_action *const wrappers[2][2] = {{ran_plain, ran_restart}, {ran_info, ran_info_restart}};

/* In place of SIG_DFL where the address may have been ours to look at.  A function of its own, and not an entry
 * in the table: a vfork child that sets its signals to their defaults shares the table with its parent. */
static void ran_default(int signal, siginfo_t *info, void *context) {
  if (is_raised(info) && fault_recover(context)) return;
  struct sigaction standard = {.sa_handler = SIG_DFL};
  REAL(sigaction)(signal, &standard, NULL);
  /* The instruction raises it again; a signal that was sent is sent again. */
  if (!is_raised(info)) REAL(syscall)(SYS_rt_tgsigqueueinfo, getpid(), REAL(syscall)(SYS_gettid), signal, info);
}

/* In place of SIG_IGN: the kernel ignores no fault, which raises it again with the default action. */
static void ran_ignored(int signal, siginfo_t *info, void *context) {
  if (is_raised(info)) ran_default(signal, info, context);
}

INTERPOSE int sigaction(int signal, const struct sigaction *restrict action, struct sigaction *restrict old) {
  if (!process_on_node || signal < 1 || signal >= _NSIG || (is_fault(signal) && !is_bad_address(signal)))
    return REAL(sigaction)(signal, action, old);
  uintptr_t before = atomic_load_explicit(&handlers[signal], memory_order_acquire);
  uint64_t bit = 1ull << (signal - 1);
  bool was_once = atomic_load(&once) & bit;
  struct sigaction wrapped, kernels;
  if (action) {
    wrapped = *action;
    if (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN) {
      /* First the table: the signal may come as soon as the kernel knows. */
      atomic_store_explicit(&handlers[signal], (uintptr_t)action->sa_handler, memory_order_release);
      wrapped.sa_sigaction =
          wrappers[(action->sa_flags & SA_SIGINFO) != 0][(action->sa_flags & SA_RESTART) != 0];
      wrapped.sa_flags |= SA_SIGINFO;
      wrapped.sa_flags &= ~(int)SA_RESETHAND;
    } else if (is_bad_address(signal)) {
      wrapped.sa_sigaction = action->sa_handler == SIG_DFL ? ran_default : ran_ignored;
      wrapped.sa_flags |= SA_SIGINFO;
    }
  }
  if (action && action->sa_flags & (int)SA_RESETHAND) atomic_fetch_or(&once, bit);
  if (REAL(sigaction)(signal, action ? &wrapped : NULL, &kernels) < 0) {
    atomic_store_explicit(&handlers[signal], before, memory_order_release);
    if (!was_once) atomic_fetch_and(&once, ~bit);
    return -1;
  }
  /* Too late for a signal that came just now: as if it had come before. */
  if (action && !(action->sa_flags & (int)SA_RESETHAND)) atomic_fetch_and(&once, ~bit);
  if (!old) return 0;
  *old = kernels;
  if (kernels.sa_sigaction == ran_default || kernels.sa_sigaction == ran_ignored) {
    old->sa_handler = kernels.sa_sigaction == ran_default ? SIG_DFL : SIG_IGN;
    old->sa_flags &= ~SA_SIGINFO;
  }
  for (int info = 0; info < 2; info++) {
    for (int restart = 0; restart < 2; restart++) {
      if (kernels.sa_sigaction != wrappers[info][restart]) continue;
      old->sa_handler = (sighandler_t)before;
      if (was_once) old->sa_flags |= (int)SA_RESETHAND;
      if (!info) old->sa_flags &= ~SA_SIGINFO;
    }
  }
  return 0;
}
int __sigaction(int signal, const struct sigaction *restrict action, struct sigaction *restrict old)
    __attribute__((alias("sigaction"), nothrow, leaf, visibility("default")));

void signals_begin(void) {
  wait_put_off_end = put_off_end;
  static const int bad_address[] = {SIGSEGV, SIGBUS};
  for (int i = 0; i < 2; i++) { /* what is there already goes behind ours */
    struct sigaction now;
    if (REAL(sigaction)(bad_address[i], NULL, &now) == 0) sigaction(bad_address[i], &now, NULL);
  }
}

/* Who blocks the signals of faults has calls of ours unblock them (fault.h).  Also in a vfork child, whose mask is
 * its own and whose variables are its parent's: so it is not noted here what the mask is, but that it is not known. */
INTERPOSE int pthread_sigmask(int how, const sigset_t *set, sigset_t *old) {
  int error = REAL(pthread_sigmask)(how, set, old);
  wait_self()->faults = 0;
  return error;
}
INTERPOSE int sigprocmask(int how, const sigset_t *restrict set, sigset_t *restrict old) {
  int result = REAL(sigprocmask)(how, set, old);
  wait_self()->faults = 0;
  return result;
}

static sighandler_t install(int number, sighandler_t handler, int flags) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = flags}, old;
  sigemptyset(&action.sa_mask);
  if (handler == SIG_ERR || (!(flags & SA_NODEFER) && sigaddset(&action.sa_mask, number) < 0)) {
    errno = EINVAL;
    return SIG_ERR;
  }
  return sigaction(number, &action, &old) < 0 ? SIG_ERR : old.sa_handler;
}

INTERPOSE sighandler_t signal(int number, sighandler_t handler) {
  bool interrupts = number > 0 && number < _NSIG && atomic_load(&interrupting) >> (number - 1) & 1;
  return install(number, handler, interrupts ? 0 : SA_RESTART);
}
sighandler_t bsd_signal(int number, sighandler_t handler) __attribute__((alias("signal"), nothrow, leaf, visibility("default")));
sighandler_t ssignal(int number, sighandler_t handler) __attribute__((alias("signal"), nothrow, leaf, visibility("default")));

sighandler_t __sysv_signal(int number, sighandler_t handler);
INTERPOSE sighandler_t __sysv_signal(int number, sighandler_t handler) {
  return install(number, handler, (int)SA_RESETHAND | SA_NODEFER);
}
sighandler_t sysv_signal(int number, sighandler_t handler)
    __attribute__((alias("__sysv_signal"), nothrow, leaf, visibility("default")));

int siginterrupt(int number, int interrupts);
INTERPOSE int siginterrupt(int number, int interrupts) {
  struct sigaction action;
  if (sigaction(number, NULL, &action) < 0) return -1;
  uint64_t bit = 1ull << (number - 1);
  if (interrupts) {
    atomic_fetch_or(&interrupting, bit);
    action.sa_flags &= ~SA_RESTART;
  } else {
    atomic_fetch_and(&interrupting, ~bit);
    action.sa_flags |= SA_RESTART;
  }
  return sigaction(number, &action, NULL);
}

sighandler_t sigset(int number, sighandler_t handler);
INTERPOSE sighandler_t sigset(int number, sighandler_t handler) {
  sigset_t one, before;
  sigemptyset(&one);
  if (sigaddset(&one, number) < 0) return SIG_ERR;
  sighandler_t was;
  if (handler == SIG_HOLD) {
    struct sigaction old;
    if (sigprocmask(SIG_BLOCK, &one, &before) < 0 || sigaction(number, NULL, &old) < 0) return SIG_ERR;
    was = old.sa_handler;
  } else {
    struct sigaction action = {.sa_handler = handler}, old;
    sigemptyset(&action.sa_mask);
    if (sigaction(number, &action, &old) < 0 || sigprocmask(SIG_UNBLOCK, &one, &before) < 0) return SIG_ERR;
    was = old.sa_handler;
  }
  return sigismember(&before, number) ? SIG_HOLD : was;
}
