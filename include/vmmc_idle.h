/*
 * vmmc_idle.h: how anything here waits: look, poll a little, sleep when it lasts.
 *
 * A poller yields the core between looks.  Where the yield comes back late, somebody else needs the
 * core: a poller then loses a whole time slice at each look, while a sleeper that is woken preempts.
 * So one late yield bans polling for a while, and each further one soon after doubles the ban: a busy
 * machine is asked rarely, and one hiccup of the hypervisor costs a millisecond.
 *
 * The figures come from measuring a two-core virtual machine, see docs/performance.md.
 */
#ifndef VMMC_IDLE_H
#define VMMC_IDLE_H

#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
  VMMC_IDLE_POLLS = 500,         /* looks before sleeping */
  VMMC_IDLE_PATIENCE_NS = 500000, /* a yield longer than this: the core is contended */
  VMMC_IDLE_BAN_NS = 1000000,     /* the first ban, doubled up to 2^10 times */
  VMMC_IDLE_CLEAN = 1000,         /* prompt yields in a row after which the ban shrinks to its first */
};

/* One waiter's experience with polling: one for a thread (or NIC), kept between waits. */
struct vmmc_idle {
  uint64_t banned_until_ns;
  uint64_t ban_ns;
  uint32_t clean;
  uint32_t polls; /* looks in the present wait */
};

static inline uint64_t vmmc_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Begins a wait: call when there was something to do. */
static inline void vmmc_idle_reset(struct vmmc_idle *idle) { idle->polls = 0; }

/* Yields once and returns true: look again.  False: it has lasted, or polling is banned: sleep. */
static inline bool vmmc_idle_poll(struct vmmc_idle *idle) {
  if (idle->polls++ >= VMMC_IDLE_POLLS) return false;
  uint64_t start = vmmc_now_ns();
  if (start < idle->banned_until_ns) return false;
  sched_yield();
  uint64_t end = vmmc_now_ns();
  if (end - start > VMMC_IDLE_PATIENCE_NS) {
    if (!idle->ban_ns) idle->ban_ns = VMMC_IDLE_BAN_NS;
    idle->banned_until_ns = end + idle->ban_ns;
    idle->clean = 0;
    if (idle->ban_ns < (uint64_t)VMMC_IDLE_BAN_NS << 10) idle->ban_ns *= 2;
  } else if (++idle->clean == VMMC_IDLE_CLEAN) {
    idle->ban_ns = VMMC_IDLE_BAN_NS;
  }
  return true;
}

/* Wakes all who sleep on a word shared between processes.  Works through a read-only mapping too. */
static inline long vmmc_futex_wake(const _Atomic uint32_t *word) {
  return syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

#endif
