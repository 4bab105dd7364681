/*
 * dma.c: the copy between two programs' memory.
 *
 * Either side may turn out not to be there: a program can truncate its segment at any time, and a full
 * /dev/shm refuses a page.  The kernel says so with SIGBUS at the load or store; the copy then ends
 * with EFAULT and harms only the connection or command that it was for.
 */
#include <setjmp.h>
#include <signal.h>
#include <string.h>

#include "nic.h"

static sigjmp_buf fault;
static volatile sig_atomic_t copying;

static void on_fault(int signal_number) {
  if (copying) siglongjmp(fault, 1);
  /* Not in a copy: a defect of the firmware.  Die of it, as without a handler. */
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

void dma_start(void) {
  /* SA_NODEFER and savesigs 0: leaving by siglongjmp restores no mask, so none may be set. */
  struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
  sigaction(SIGBUS, &action, NULL);
}

int dma_copy(void *to, const void *from, size_t length) {
  if (sigsetjmp(fault, 0)) {
    copying = 0;
    return EFAULT;
  }
  copying = 1;
  /* The signal fence keeps the copy inside the window that the handler sees. */
  atomic_signal_fence(memory_order_seq_cst);
  memcpy(to, from, length);
  atomic_signal_fence(memory_order_seq_cst);
  copying = 0;
  return 0;
}
