/* wait.h: how a thread of the program waits for its NIC: polls a little, then sleeps on words that
 * the NIC changes, and never loses a signal. */
#ifndef VMMC_WAIT_H
#define VMMC_WAIT_H

#include <pthread.h>
#include <stdatomic.h>
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
  _Atomic uint32_t critical;           /* depth of critical sections: see below */
  _Atomic bool put_off;                /* a handler waits for the end of the critical section */
  struct wait_undo *undo;              /* what the calls under way give back, innermost first: see below */
  void **recovery;                     /* where a fault goes on while the program's memory is touched: fault.h */
  uint8_t faults;                      /* FAULTS_*: which of their signals the thread blocks; 0: to be looked up */
  struct vmmc_idle idle;
  bool said;     /* since it polled last it sent all that it wanted to: it may be waiting for an answer */
  uint8_t turns; /* waits in which it was so, lately */
  bool rang;     /* for a connection within the node, since the NIC was last let catch up: endpoint_let_nic_catch_up */
  bool ahead;    /* wait_ahead has begun the wait that this call may come to */
  uint64_t worked; /* since it gave way last: see wait_worked */
};
/* This thread's.  Initial-exec, so that it may be used in a signal handler and costs no call. */
extern _Thread_local struct wait_thread wait_thread __attribute__((tls_model("initial-exec")));
static inline struct wait_thread *wait_self(void) { return &wait_thread; }

/*
 * Critical sections.  close, send, poll and their like are calls that a signal handler may make, so no
 * handler may run in a thread that has one of our locks.  Blocking signals would cost two system calls a
 * lock; instead the interposer's wrapper of handlers looks whether its thread is in a critical section, and
 * if so puts the signal off: `wait_put_off_end`, which it sets, lets it come at the section's end.  All
 * this is one thread talking to itself, so relaxed order and fences for the compiler do.
 */
extern void (*wait_put_off_end)(void);

static inline void critical_begin(void) {
  uint32_t depth = atomic_load_explicit(&wait_thread.critical, memory_order_relaxed);
  atomic_store_explicit(&wait_thread.critical, depth + 1, memory_order_relaxed);
  atomic_signal_fence(memory_order_seq_cst);
}

static inline void critical_end(void) {
  atomic_signal_fence(memory_order_seq_cst);
  uint32_t depth = atomic_load_explicit(&wait_thread.critical, memory_order_relaxed) - 1;
  atomic_store_explicit(&wait_thread.critical, depth, memory_order_relaxed);
  atomic_signal_fence(memory_order_seq_cst);
  if (__builtin_expect(atomic_load_explicit(&wait_thread.put_off, memory_order_relaxed), 0) && !depth)
    wait_put_off_end();
}

/* A lock of ours, held for a few lines and never asleep. */
static inline void critical_lock(pthread_mutex_t *lock) {
  critical_begin();
  pthread_mutex_lock(lock);
}

static inline void critical_unlock(pthread_mutex_t *lock) {
  pthread_mutex_unlock(lock);
  critical_end();
}

/*
 * A signal handler may leave the call that it interrupted by siglongjmp, and no cleanup of C's runs then.  What
 * a call must give back stands in a list of records, each in the frame of its function; the interposed longjmp
 * (preload/jumps.c) runs those of the frames that it leaves.
 */
struct wait_undo {
  struct wait_undo *outer;
  void (*undo)(void *context);
  void *context;
};

static inline void wait_undo_push(struct wait_undo *record, void (*undo)(void *context), void *context) {
  *record = (struct wait_undo){wait_thread.undo, undo, context};
  atomic_signal_fence(memory_order_seq_cst); /* a handler finds it filled in */
  wait_thread.undo = record;
}

static inline void wait_undo_pop(const struct wait_undo *record) {
  wait_thread.undo = record->outer;
  atomic_signal_fence(memory_order_seq_cst); /* not twice: what it speaks of is given back after this */
}

/* Snapshot of the signal words, taken on entry of a call, and the test whether a handler that interrupts it ran
 * since then: also while it was not waiting, or between two waits. */
struct wait_signals { uint32_t signals, no_restart; };
struct wait_signals wait_signals_now(void);
bool wait_interrupted(struct wait_signals since, bool any_handler);

/* What a wait looks at: its NIC-written word and the count of sleepers that the NIC reads. */
struct wait_word {
  const _Atomic uint32_t *word;
  _Atomic uint32_t *asleep;
};

#define WAIT_FOREVER UINT64_MAX

/* Begins a wait for the NIC. */
static inline void wait_begin(void) {
  vmmc_idle_begin(&wait_thread.idle);
  wait_thread.ahead = false;
}

/*
 * Polls in a wait for the NIC, between wait_begin and vmmc_idle_woken of this thread's `idle`; as vmmc_idle_poll.
 * A thread that says something and waits, again and again, is one that plays with a peer by turns: where its NIC runs
 * on another core it keeps its own for a moment after each change (look_ns), for the answer that comes meanwhile.
 * Its first poll gives way at once: to the peer, or to the peer's NIC.
 */
bool wait_poll(void);

/*
 * A call that would wait for an answer.  Whose thread says something and waits, again and again, gives way as soon as
 * it finds nothing there, and gets ready to wait when it comes back: mostly there is something then.
 */
static inline bool wait_takes_turns(void) { return wait_thread.said && wait_thread.turns >= VMMC_IDLE_TURNS_ENOUGH; }
void wait_ahead(void);
static inline void wait_ahead_end(void) { wait_thread.ahead = false; } /* the call did not come to wait */

/*
 * A call moved `bytes` without a wait.  Who does so for a while gives way, once: its own NIC, or the peer's, may have
 * yielded this core to it, and would take a yield that comes back late for a core that somebody else holds.
 */
void wait_give_way(void);
static inline void wait_worked(uint64_t bytes) {
  enum { CALL = 1024, ENOUGH = 1 << 20 }; /* a call as so many bytes; a few hundred microseconds of either */
  wait_thread.worked += bytes + CALL;
  if (__builtin_expect(wait_thread.worked >= ENOUGH, 0)) wait_give_way();
}

/*
 * Waits until ready(context) returns true: looks, polls a little, then sleeps on the words (1..16).
 * deadline_ns: CLOCK_MONOTONIC, WAIT_FOREVER for none.  since: when the call began.  any_handler: not only
 * one without SA_RESTART interrupts it: as on Linux, where the call has a timeout of the program's
 * (SO_RCVTIMEO, poll) or has moved bytes already.  The program's locks must not be held.
 * 0: ready; -ETIMEDOUT; -EINTR: a handler ran that does not restart the call.
 */
int wait_until(const struct wait_word *words, int count, bool (*ready)(void *context), void *context,
               uint64_t deadline_ns, struct wait_signals since, bool any_handler);

VMMC_INTERNAL_END

#endif
