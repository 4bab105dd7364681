/*
 * jumps.c: longjmp out of a signal handler that interrupted a call of ours.
 *
 * The kernel's calls have nothing to give back when a handler leaves them; ours have, and say so in a list of
 * records in their frames (wait.h).  The jump tells by its target's stack pointer which frames it leaves.
 */
#include <setjmp.h>
#include <stdint.h>

#include "descriptors.h"
#include "real.h"

/* The stack pointer that a jump restores, as the C library hides it; 0: not known, nothing is given back. */
static uintptr_t target_of(const struct __jmp_buf_tag *buffer) {
#if defined(__x86_64__) && defined(__LP64__) && defined(__GLIBC__)
  uintptr_t hidden = (uintptr_t)buffer->__jmpbuf[6], guard;
  __asm__("mov %%fs:0x30, %0" : "=r"(guard));
  return (hidden >> 17 | hidden << 47) ^ guard;
#else
  (void)buffer;
  return 0;
#endif
}

static bool is_on(const stack_t *stack, uintptr_t at) {
  return !(stack->ss_flags & SS_DISABLE) && at - (uintptr_t)stack->ss_sp < stack->ss_size;
}

static void leave_frames(const struct __jmp_buf_tag *buffer) {
  struct wait_thread *self = wait_self();
  self->faults = 0; /* the mask may be another one afterwards */
  wait_ahead_end();
  if (__builtin_expect(!self->undo, 1)) return;
  uintptr_t target = target_of(buffer);
  /* A handler's own stack lies anywhere: what is on it is left by a jump to the other, and not the reverse. */
  stack_t handlers = {.ss_flags = SS_DISABLE};
  sigaltstack(NULL, &handlers);
  bool target_is_handlers = is_on(&handlers, target);
  while (self->undo) {
    struct wait_undo *record = self->undo;
    bool is_handlers = is_on(&handlers, (uintptr_t)record);
    if (is_handlers == target_is_handlers ? (uintptr_t)record >= target : target_is_handlers) break;
    wait_undo_pop(record);
    record->undo(record->context);
  }
}

/* Under names of their own in C, since the C library's headers may rename longjmp to its checked form. */
#define JUMP(symbol)                                                                                            \
  __attribute__((noreturn)) void jump_##symbol(struct __jmp_buf_tag *buffer, int value) __asm__(#symbol);       \
  INTERPOSE void jump_##symbol(struct __jmp_buf_tag *buffer, int value) {                                       \
    leave_frames(buffer);                                                                                       \
    REAL(symbol)(buffer, value);                                                                                \
    __builtin_unreachable();                                                                                    \
  }
JUMP(longjmp)
JUMP(_longjmp)
JUMP(siglongjmp)
JUMP(__longjmp_chk)
