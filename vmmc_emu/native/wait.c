/*
 * wait.c: how a thread of the program waits for its NIC.
 *
 * Look, poll a little (vmmc_idle.h), then sleep in the kernel on several words at once: those that the
 * NIC changes and the thread's own count of signal handlers that ran.  The latter closes the gap
 * between the last look and the sleep: a handler that runs in it has changed the word.
 */
#include "wait.h"

#include <errno.h>
#include <pthread.h>

#include "endpoint.h"
#include "sys.h"

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

enum {
  WORDS_MAX = 16,
  SLICE_NS = 5000000, /* without futex_waitv: how long a word that is not slept on goes unseen */
};

/* The kernel's struct futex_waitv: spelled out, since headers of older systems lack it. */
struct waiter {
  uint64_t value, address;
  uint32_t flags, reserved;
};
enum { WAITER_32 = 2, WAITER_PRIVATE = 128 };

_Thread_local struct wait_thread wait_thread __attribute__((tls_model("initial-exec")));
void (*wait_put_off_end)(void);
static _Atomic bool no_waitv; /* the kernel, or a filter over it, does not have futex_waitv */

struct wait_signals wait_signals_now(void) {
  return (struct wait_signals){ atomic_load_explicit(&wait_thread.signals, memory_order_relaxed),
                                atomic_load_explicit(&wait_thread.signals_no_restart, memory_order_relaxed) };
}

bool wait_interrupted(struct wait_signals since, bool any_handler) {
  struct wait_signals now = wait_signals_now();
  return any_handler ? now.signals != since.signals : now.no_restart != since.no_restart;
}

/* A sleep that is under way, for the case that the thread is cancelled in it. */
struct sleep {
  const struct wait_word *words;
  int count;
};

static void announce(const struct sleep *sleep) {
  /* seq_cst: before the look that follows; the NIC looks here after it changed what we look at */
  for (int i = 0; i < sleep->count; i++) atomic_fetch_add(sleep->words[i].asleep, 1);
}

static void retract(void *context) {
  const struct sleep *sleep = context;
  for (int i = 0; i < sleep->count; i++)
    atomic_fetch_sub_explicit(sleep->words[i].asleep, 1, memory_order_relaxed);
}

static struct timespec time_of(uint64_t ns) {
  return (struct timespec){ .tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u) };
}

/* Without futex_waitv (before Linux 5.16): on the first word alone, and never for long, so that a change of
 * another word or a handler that ran just before is seen late, but seen.  A futex wait with a timeout ends
 * with EINTR also for a handler with SA_RESTART; where handlers are counted, that does not matter. */
static int sleep_in_slices(const struct waiter *waiters, int count, uint64_t deadline_ns) {
  uint64_t slice = vmmc_now_ns() + SLICE_NS;
  (void)count;
  struct timespec until = time_of(slice < deadline_ns ? slice : deadline_ns);
  /* FUTEX_WAIT_BITSET takes an absolute time, of CLOCK_MONOTONIC */
  long r = sys_call(SYS_futex, (long)waiters[0].address, FUTEX_WAIT_BITSET, (long)waiters[0].value,
                    (long)&until, 0, (long)FUTEX_BITSET_MATCH_ANY);
  return r == -EINTR ? -EINTR : 0;
}

/* 0 whenever it is worth looking again, or -EINTR. */
static int sleep_on(const struct waiter *waiters, int count, uint64_t deadline_ns) {
  if (atomic_load_explicit(&no_waitv, memory_order_relaxed))
    return sleep_in_slices(waiters, count, deadline_ns);
  struct timespec until = time_of(deadline_ns);
  long r = sys_call(SYS_futex_waitv, (long)waiters, count, 0, deadline_ns == WAIT_FOREVER ? 0 : (long)&until,
                    CLOCK_MONOTONIC, 0);
  if (r == -ENOSYS || r == -EPERM) atomic_store_explicit(&no_waitv, true, memory_order_relaxed);
  return r == -EINTR ? -EINTR : 0;
}

static void count_sleep(void) {
  struct endpoint *e = endpoint_current();
  if (e) atomic_fetch_add_explicit(&app_header(e)->counters.app_sleeps, 1, memory_order_relaxed);
}

/* Announces, looks again, sleeps.  0: look; -EINTR: the kernel says that a handler without SA_RESTART ran.
 * Not inlined: pthread_cleanup_push may be a setjmp, after which only volatile locals keep their values. */
__attribute__((noinline)) static int
sleep_once(const struct wait_word *words, int count, bool (*ready)(void *), void *context,
           struct wait_signals since, uint64_t deadline_ns, bool any_handler) {
  struct waiter waiters[WORDS_MAX + 1];
  struct sleep sleep = { words, count };
  volatile int result = 0;
  int old_type;
  /* Values are taken before the last look: what changes after it wakes us or keeps us awake. */
  uint32_t signals = atomic_load_explicit(&wait_thread.signals, memory_order_relaxed);
  struct wait_undo undo;
  announce(&sleep);
  wait_undo_push(&undo, retract, &sleep);
  pthread_cleanup_push(retract, &sleep);
  for (int i = 0; i < count; i++)
    waiters[i] = (struct waiter){ atomic_load(words[i].word), (uintptr_t)words[i].word, WAITER_32, 0 };
  waiters[count] = (struct waiter){ signals, (uintptr_t)&wait_thread.signals, WAITER_32 | WAITER_PRIVATE, 0 };
  if (!ready(context) && !wait_interrupted(since, any_handler)) {
    count_sleep();
    /* As a blocking call of libc's: pthread_cancel ends the sleep, and nothing else in here. */
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &old_type);
    result = sleep_on(waiters, count + 1, deadline_ns);
    pthread_setcanceltype(old_type, NULL);
  }
  wait_undo_pop(&undo);
  pthread_cleanup_pop(1);
  return result;
}

/* How to poll in the wait that begins. */
static void take_turns(struct wait_thread *self) {
  if (!self->said)
    self->turns /= 2;
  else if (self->turns < VMMC_IDLE_TURNS_MAX)
    self->turns++;
  self->said = false;
  self->idle.look_ns = 0;
  if (self->turns < VMMC_IDLE_TURNS_ENOUGH) return;
  struct endpoint *e = endpoint_current();
  /* relaxed: a hint */
  if (e && atomic_load_explicit(&e->pub->cpu, memory_order_relaxed) != vmmc_idle_cpu())
    self->idle.look_ns = VMMC_IDLE_LOOK_NS;
}

bool wait_poll(void) {
  struct wait_thread *self = wait_self();
  if (!self->idle.began_ns) take_turns(self);
  self->worked = 0;
  return vmmc_idle_poll(&self->idle);
}

void wait_ahead(void) {
  wait_begin();
  wait_self()->ahead = true;
  wait_poll();
}

void wait_give_way(void) {
  struct wait_thread *self = wait_self();
  self->worked = 0;
  vmmc_idle_yield(&self->idle, vmmc_now_ns());
}

int wait_until(const struct wait_word *words, int count, bool (*ready)(void *context), void *context,
               uint64_t deadline_ns, struct wait_signals since, bool any_handler) {
  if (!wait_thread.ahead) wait_begin();
  wait_ahead_end();
  for (;;) {
    if (ready(context)) return 0;
    if (wait_interrupted(since, any_handler)) return -EINTR;
    if (deadline_ns != WAIT_FOREVER && vmmc_now_ns() >= deadline_ns) return -ETIMEDOUT;
    if (wait_poll()) continue;
    uint32_t before = atomic_load_explicit(&wait_thread.signals, memory_order_relaxed);
    int result = sleep_once(words, count, ready, context, since, deadline_ns, any_handler);
    vmmc_idle_woken(&wait_thread.idle);
    /* Where handlers are counted the counts decide; where they are not, the kernel does. */
    if (result == -EINTR && before == atomic_load_explicit(&wait_thread.signals, memory_order_relaxed))
      return ready(context) ? 0 : -EINTR;
  }
}
