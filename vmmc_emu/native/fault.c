/* fault.c: accesses to memory that may not be there.  See fault.h. */
#include "fault.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include "sys.h"
#include "vmmc_copy.h"
#include "wait.h"

/* ---- threads that block the signals of faults ---- */

static const uint64_t segv = 1ull << (SIGSEGV - 1), bus = 1ull << (SIGBUS - 1);

static void change_mask(int how, uint8_t faults) {
  uint64_t mask = (faults & FAULTS_SEGV ? segv : 0) | (faults & FAULTS_BUS ? bus : 0);
  sys_call(SYS_rt_sigprocmask, how, (long)&mask, 0, sizeof mask, 0, 0);
}

/* Lets faults through.  True: faults_block is to follow. */
__attribute__((noinline)) static bool faults_unblock(void) {
  if (!wait_thread.faults) {
    uint64_t mask = 0;
    sys_call(SYS_rt_sigprocmask, SIG_BLOCK, 0, (long)&mask, sizeof mask, 0, 0);
    wait_thread.faults = (uint8_t)(FAULTS_KNOWN | (mask & segv ? FAULTS_SEGV : 0) | (mask & bus ? FAULTS_BUS : 0));
  }
  if (wait_thread.faults == FAULTS_KNOWN) return false;
  change_mask(SIG_UNBLOCK, wait_thread.faults);
  return true;
}

static void faults_block(void) { change_mask(SIG_BLOCK, wait_thread.faults); }

/* ---- guarded accesses ---- */

/* Runs the statement; where it faults, the function returns false. */
#define GUARDED(statement)                                                                                 \
  do {                                                                                                     \
    void *point[5];                      /* what __builtin_setjmp needs */                                 \
    void **outer = wait_thread.recovery; /* a handler may interrupt an access, and make calls itself */    \
    bool blocked = __builtin_expect(wait_thread.faults != FAULTS_KNOWN, 0) && faults_unblock();            \
    if (__builtin_setjmp(point)) {                                                                         \
      wait_thread.recovery = outer;                                                                        \
      if (blocked) faults_block();                                                                         \
      return false;                                                                                        \
    }                                                                                                      \
    wait_thread.recovery = point;                                                                          \
    atomic_signal_fence(memory_order_seq_cst);                                                             \
    statement;                                                                                             \
    atomic_signal_fence(memory_order_seq_cst);                                                             \
    wait_thread.recovery = outer;                                                                          \
    if (__builtin_expect(blocked, 0)) faults_block();                                                      \
  } while (0)

bool fault_guard(void (*access)(void *context), void *context) {
  GUARDED(access(context));
  return true;
}

/* A program may have named NULL: that faults, as any bad address does, though memcpy is declared never to get it. */
__attribute__((no_sanitize("nonnull-attribute"))) bool fault_copy(void *to, const void *from, size_t length) {
  GUARDED(vmmc_copy(to, from, length));
  return true;
}

/* Where the thread goes on after the handler: out of the kernel's signal frame, with its mask as it was. */
__attribute__((noreturn)) static void resume(void) { __builtin_longjmp(wait_thread.recovery, 1); }

bool fault_recover(void *ucontext) {
  ucontext_t *context = ucontext;
  if (!wait_thread.recovery) return false;
  /* Below the interrupted frame and its red zone: that frame is not returned to. */
#if defined(__x86_64__)
  greg_t *registers = context->uc_mcontext.gregs;
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~(greg_t)15) - 8; /* as after a call */
  registers[REG_RIP] = (greg_t)(uintptr_t)resume;
  registers[REG_EFL] &= ~(greg_t)0x400; /* copies forward: what functions may expect */
#elif defined(__aarch64__)
  context->uc_mcontext.sp = (context->uc_mcontext.sp - 256) & ~15ull;
  context->uc_mcontext.pc = (uintptr_t)resume;
#else
#error "a fault is left by setting program counter and stack pointer: add this architecture's here"
#endif
  return true;
}
