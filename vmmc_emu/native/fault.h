/*
 * fault.h: touching memory that the program named, which may not be there.
 *
 * The kernel answers EFAULT to a bad address; a library that copies would crash.  Whatever the program named
 * is therefore touched in a guarded access: a fault in it ends the access, and the call says EFAULT.  That
 * costs a few stores where nothing is wrong, and needs the handler of SIGSEGV and SIGBUS that the preload
 * library keeps (preload/signals.c): without it a fault is a fault.
 *
 * The kernel kills a thread that faults while it blocks the signal.  So one that does unblocks it for the time of
 * the access.  Whether it does is looked up when it may have changed: preload/signals.c sees that, and says 0.
 */
#ifndef VMMC_FAULT_H
#define VMMC_FAULT_H

#include <stdbool.h>
#include <stddef.h>

#include "internal.h"

VMMC_INTERNAL_BEGIN

enum { /* wait_thread.faults */
  FAULTS_SEGV = 1,  /* SIGSEGV is blocked */
  FAULTS_BUS = 2,   /* SIGBUS is */
  FAULTS_KNOWN = 4, /* the other two say how it is */
};

/* Runs access(context).  False: it met an address that is bad, and ended there.  The access itself must have
 * nothing to give back. */
bool fault_guard(void (*access)(void *context), void *context);

/* Copies in or out, one side being the program's.  False: EFAULT; then some of the bytes may have been copied. */
bool fault_copy(void *to, const void *from, size_t length);

/* For the handler of a fault: when it came in a guarded access of this thread, `ucontext` goes on behind that. */
bool fault_recover(void *ucontext);

VMMC_INTERNAL_END

#endif
