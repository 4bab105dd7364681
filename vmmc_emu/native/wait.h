/* wait.h: how a thread of the program waits for its NIC: polls a little, then sleeps on words that
 * the NIC changes, and never loses a signal. */
#ifndef VMMC_WAIT_H
#define VMMC_WAIT_H

#include <stdbool.h>
#include <stdint.h>

#include "vmmc_idle.h"
#include "internal.h"
#include "vmmc_layout.h"

VMMC_INTERNAL_BEGIN

/*
 * Signals.  A handler that runs while a thread polls at user level would not be noticed by it.  The
 * interposer wraps handlers so that each run raises `signals` of the thread that it ran in, and sets
 * `signals_no_restart` when the handler was installed without SA_RESTART.  Without the interposer
 * (a program linked to libvmmc) the words stay 0 and sleeping still ends with EINTR.
 */
struct wait_thread {
  _Atomic uint32_t signals;            /* handlers that ran in this thread: also a futex word */
  _Atomic uint32_t signals_no_restart; /* of those, how many were installed without SA_RESTART */
  struct vmmc_idle idle;
};
struct wait_thread *wait_self(void); /* this thread's; async-signal-safe (initial-exec TLS) */

/* What a wait looks at: its NIC-written word and the count of sleepers that the NIC reads. */
struct wait_word {
  const _Atomic uint32_t *word;
  _Atomic uint32_t *asleep;
};

#define WAIT_FOREVER UINT64_MAX

/*
 * Waits until ready(context) returns true: looks, polls a little, then sleeps on the words (1..16).
 * deadline_ns: CLOCK_MONOTONIC, WAIT_FOREVER for none.  timed_call: the call has a timeout of the
 * program's (SO_RCVTIMEO, poll), so that any handler interrupts it (as Linux does).
 * The program's locks must not be held.
 * 0: ready; -ETIMEDOUT; -EINTR: a handler ran that does not restart the call.
 */
int wait_until(const struct wait_word *words, int count, bool (*ready)(void *context), void *context,
               uint64_t deadline_ns, bool timed_call);

/* Snapshot of the signal words, to be taken on entry of a call, and the test whether since then a
 * handler ran that interrupts it. wait_until takes its own; readiness code that sleeps in the kernel
 * uses these. */
struct wait_signals { uint32_t signals, no_restart; };
struct wait_signals wait_signals_now(void);
bool wait_interrupted(struct wait_signals since, bool timed_call);

VMMC_INTERNAL_END

#endif
