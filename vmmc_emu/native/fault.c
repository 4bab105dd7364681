/* fault.c: accesses to memory that may not be there.  See fault.h. */
#include "fault.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include "wait.h"

/* Runs the statement; where it faults, the function returns false. */
#define GUARDED(statement)                                                                                 \
  do {                                                                                                     \
    void *point[5];                      /* what __builtin_setjmp needs */                                 \
    void **outer = wait_thread.recovery; /* a handler may interrupt an access, and make calls itself */    \
    if (__builtin_setjmp(point)) {                                                                         \
      wait_thread.recovery = outer;                                                                        \
      return false;                                                                                        \
    }                                                                                                      \
    wait_thread.recovery = point;                                                                          \
    atomic_signal_fence(memory_order_seq_cst);                                                             \
    statement;                                                                                             \
    atomic_signal_fence(memory_order_seq_cst);                                                             \
    wait_thread.recovery = outer;                                                                          \
  } while (0)

bool fault_guard(void (*access)(void *context), void *context) {
  GUARDED(access(context));
  return true;
}

/* A program may have named NULL: that faults, as any bad address does, though memcpy is declared never to get it. */
__attribute__((no_sanitize("nonnull-attribute"))) bool fault_copy(void *to, const void *from, size_t length) {
  GUARDED(memcpy(to, from, length));
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
