/*
 * vmmc_idle.h: how anything here waits: look, poll a little, sleep when it lasts.
 *
 * Whether polling pays is learnt from the waits before.  A wait that ended within WORTHWHILE although its
 * thread had gone to sleep would have been shorter with more looks: the budget of looks doubles.  A longer
 * one polled in vain: the budget falls to a quarter.  So two that play ping-pong poll, and of a hundred that
 * pass a token around nearly all sleep, as do those that wait by turns for something near and something far.
 *
 * A poller yields the core between looks.  Where the yield comes back late, somebody else needs the
 * core: a poller then loses a whole time slice at each look, while a sleeper that is woken preempts.
 * So one late yield bans polling for a while, and each further one soon after makes the ban longer: a busy
 * machine is asked rarely, and one hiccup of the hypervisor costs a few milliseconds.
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
  VMMC_IDLE_WORTHWHILE_NS = 100000, /* a wait that polling could have shortened: a few wakes from deep idleness */
  VMMC_IDLE_LOOK_NS = 4000,        /* see look_ns: longer than another core takes to change to whom we wait for */
  VMMC_IDLE_LOOK_COST = 2,         /* looks at once that one such yield counts for */
  VMMC_IDLE_TURNS_ENOUGH = 8,      /* said and answered, lately, before a program or its NIC counts on the next answer */
  VMMC_IDLE_TURNS_MAX = 64,        /* that count */
  VMMC_IDLE_BUDGET_FIRST = 8,      /* looks: the least that is worth beginning with */
  VMMC_IDLE_BUDGET_MAX = 256, /* about as long as is worthwhile */
  VMMC_IDLE_PATIENCE_NS = 1000000, /* a yield longer than this: the core is contended.  Who computes keeps it for a
                                      slice, 1.4 ms or more; who does a little now and then returns it before */
  VMMC_IDLE_BAN_NS = 8000000,      /* the first ban; each further one is four times as long, up to: */
  VMMC_IDLE_BAN_MAX_NS = 512000000,
  VMMC_IDLE_CLEAN = 1000,          /* prompt yields in a row after which the ban shrinks to its first */
};

/* One waiter's experience with polling: one for a thread (or NIC), kept between waits.  All 0: none yet. */
struct vmmc_idle {
  uint64_t began_ns, woken_ns; /* the present wait's first look, the end of its last sleep; 0: none */
  uint64_t banned_until_ns;
  uint32_t ban_ns;
  uint32_t clean;
  uint32_t budget; /* looks before sleeping */
  uint32_t polls;  /* looks in the present wait */
  /* Before each yield but a wait's first, look for so long: not 0 where whom we wait for runs on another core and
   * is perhaps about to be done.  It would find us on the way from core to core otherwise. */
  uint32_t look_ns;
  uint64_t look_until_ns; /* until then it looks and keeps the core */
};

static inline uint64_t vmmc_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Which core this thread runs on. */
static inline uint32_t vmmc_idle_cpu(void) { return (uint32_t)sched_getcpu(); }

/* Between two looks: leaves the core's other thread room. */
static inline void vmmc_idle_pause(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Begins a wait, and learns from the one before. */
static inline void vmmc_idle_begin(struct vmmc_idle *idle) {
  if (idle->woken_ns) { /* it slept */
    if (idle->woken_ns - idle->began_ns > VMMC_IDLE_WORTHWHILE_NS)
      idle->budget /= 4;
    else if (idle->budget < VMMC_IDLE_BUDGET_FIRST)
      idle->budget = VMMC_IDLE_BUDGET_FIRST;
    else if (idle->budget < VMMC_IDLE_BUDGET_MAX)
      idle->budget *= 2;
  }
  idle->began_ns = idle->woken_ns = idle->look_until_ns = 0;
  idle->polls = 0;
}

/* Yields once and returns true: look again.  False: a yield would come back late. */
static inline bool vmmc_idle_yield(struct vmmc_idle *idle, uint64_t start) {
  if (start < idle->banned_until_ns) return false;
  sched_yield();
  uint64_t end = vmmc_now_ns();
  idle->look_until_ns = end + idle->look_ns;
  if (end - start > VMMC_IDLE_PATIENCE_NS) {
    if (!idle->ban_ns) idle->ban_ns = VMMC_IDLE_BAN_NS;
    idle->banned_until_ns = end + idle->ban_ns;
    idle->clean = 0;
    if (idle->ban_ns < VMMC_IDLE_BAN_MAX_NS) idle->ban_ns *= 4;
  } else if (++idle->clean == VMMC_IDLE_CLEAN) {
    idle->ban_ns = VMMC_IDLE_BAN_NS;
  }
  return true;
}

/* The same in a wait.  False: it has lasted, or polling is banned: sleep, and call vmmc_idle_woken after it. */
static inline bool vmmc_idle_poll(struct vmmc_idle *idle) {
  uint64_t start = vmmc_now_ns();
  if (!idle->began_ns) idle->began_ns = start;
  if (start < idle->look_until_ns) {
    vmmc_idle_pause();
    return true;
  }
  if (idle->woken_ns || idle->polls >= idle->budget) return false;
  idle->polls += idle->look_ns ? VMMC_IDLE_LOOK_COST : 1;
  return vmmc_idle_yield(idle, start);
}

static inline void vmmc_idle_woken(struct vmmc_idle *idle) { idle->woken_ns = vmmc_now_ns(); }

/* Wakes up to `count` of those, or all, who sleep on a word shared between processes.  Works through a read-only
 * mapping too. */
static inline long vmmc_futex_wake_some(const _Atomic uint32_t *word, int count) {
  return syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}
static inline long vmmc_futex_wake(const _Atomic uint32_t *word) { return vmmc_futex_wake_some(word, INT32_MAX); }

#endif
