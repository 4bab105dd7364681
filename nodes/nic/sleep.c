/*
 * sleep.c: sleeping until somebody rings.
 *
 * Announce (pub.asleep), look at everything once more, sleep.  Who gives work stores it, then looks at the
 * announcement, then changes its bell and wakes it.  The bells' values are read before the last look, and
 * the kernel compares them when it puts the NIC to sleep: a ring in between is not lost.  Each program has
 * a bell in its own segment, so that none can silence another; peers share the one in the door.
 */
#include <signal.h>
#include <string.h>

#include "nic.h"

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

enum {
  BELLS_MAX = 128,        /* that the kernel waits for at once */
  EARLY_NS = 60000,       /* before something is due: what waking up takes, at most, as a rule */
  FALLBACK_NS = 1000000,  /* looks again after so long where it cannot wait for all of them */
};

struct bell { /* struct futex_waitv of linux/futex.h, which older headers lack */
  uint64_t value, address;
  uint32_t flags, reserved;
};

void sleep_not(void) {
  if (nic.door) atomic_fetch_add(&nic.door->bell, 1);
}

static void add(struct bell *bell, _Atomic uint32_t *word) {
  enum { WORD_OF_32_BITS = 2 }; /* FUTEX2_SIZE_U32; shared between processes */
  *bell = (struct bell){ atomic_load(word), (uint64_t)(uintptr_t)word, WORD_OF_32_BITS, 0 };
}

/* A kernel before 5.16, or more programs than it can wait for: sleep in slices. */
static void sleep_a_slice(uint32_t door_bell, uint64_t left_ns) {
  struct timespec slice = { 0, left_ns < FALLBACK_NS ? (long)left_ns : FALLBACK_NS };
  syscall(SYS_futex, &nic.door->bell, FUTEX_WAIT, door_bell, &slice, NULL, 0);
}

/* due_ns: when there is work without anybody's ringing (CLOCK_MONOTONIC).  The last microseconds before that
 * are polled: waking up takes as long, and never the same. */
void sleep_until_work(bool (*have_work)(void), uint64_t due_ns) {
  static bool old_kernel;
  uint64_t left_ns = UINT64_MAX, sweep_ns = give_back_due_ns();
  if (sweep_ns && sweep_ns < due_ns) due_ns = sweep_ns;
  if (due_ns != UINT64_MAX) {
    uint64_t now_ns = vmmc_now_ns();
    left_ns = due_ns > now_ns ? due_ns - now_ns : 0;
    if (left_ns <= EARLY_NS) {
      if (left_ns) sched_yield();
      return;
    }
    left_ns -= EARLY_NS;
    due_ns -= EARLY_NS;
  }
  struct bell bells[BELLS_MAX];
  uint32_t count = 0;
  atomic_store(&nic.pub->asleep, 1);
  atomic_thread_fence(memory_order_seq_cst);
  add(&bells[count++], &nic.door->bell);
  for (uint32_t i = 0; i < nic.live_count && count < BELLS_MAX; i++)
    if (!nic.endpoint[nic.live[i]]->dying) add(&bells[count++], &app_header(nic.endpoint[nic.live[i]])->bell);
  bool all = nic.live_count < BELLS_MAX;
  atomic_thread_fence(memory_order_seq_cst);
  if (!have_work()) {
    COUNT_NODE(sleeps, 1);
    struct timespec until = { (time_t)(due_ns / 1000000000u), (long)(due_ns % 1000000000u) };
    if (!all || old_kernel)
      sleep_a_slice((uint32_t)bells[0].value, left_ns);
    else if (syscall(SYS_futex_waitv, bells, count, 0, left_ns == UINT64_MAX ? NULL : &until, CLOCK_MONOTONIC) < 0 &&
             errno == ENOSYS)
      old_kernel = true;
  }
  atomic_store(&nic.pub->asleep, 0);
}
