/*
 * wake.c: waking programs.
 *
 * Every sleep in the library announces itself (a count or a bit in the app's segment) and then looks at
 * the state again; here the state is stored first, then comes a seq_cst fence, then the look at the
 * announcement.  One of the two sees the other.
 */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#include "nic.h"

#ifndef sigev_notify_thread_id /* glibc before 2.38 has no name for it */
#define sigev_notify_thread_id _sigev_un._tid
#endif

static void wake_word(struct endpoint *e, _Atomic uint32_t *word, int count) {
  /* One writer, so load and store.  release: the woken one sees what it was woken for. */
  atomic_store_explicit(word, atomic_load_explicit(word, memory_order_relaxed) + 1, memory_order_release);
  vmmc_futex_wake_some(word, count);
  core_woke();
  COUNT(e, wakes, 1);
}

static void enter_event(struct endpoint *e, uint32_t slot) {
  struct vmmc_nic_header *header = nic_header(e);
  struct slot_work *work = &e->work[slot];
  uint64_t events = atomic_load_explicit(&header->events, memory_order_relaxed);
  uint64_t taken = atomic_load(&app_header(e)->events_taken);
  /* Still in the ring, untaken: the app takes it (events_taken) before it reads the slot, and will
   * see what we stored.  A hostile events_taken costs the app its own events, nothing else. */
  if (work->last_event > taken && work->last_event <= events) return;
  uint64_t at = events % VMMC_EVENTS * sizeof(uint32_t);
  if (at >= e->events_committed) {
    if (!segment_commit(e->nic_fd, VMMC_NIC_EVENTS + e->events_committed, VMMC_PAGE)) {
      log_event("error", "endpoint %u (pid %d) misses an event", e->index, e->pid);
      return;
    }
    e->events_committed += VMMC_PAGE;
  }
  _Atomic uint32_t *ring = (_Atomic uint32_t *)(e->nic + VMMC_NIC_EVENTS);
  atomic_store_explicit(&ring[events % VMMC_EVENTS], slot, memory_order_relaxed);
  /* seq_cst: ordered before the looks at who sleeps */
  atomic_store(&header->events, events + 1);
  work->last_event = events + 1;
}

/*
 * Event descriptors are the programs' own, and a program can make the write to one wait for ever: it fills the
 * count and clears O_NONBLOCK, which belongs to the open file and not to our descriptor.  So no write begins
 * without a timer that will interrupt it; the timer is set anew only when little of its time is left.
 */
enum { GUARD_NS = 100000000 };
static timer_t guard;

static void on_guard(int signal_number) { (void)signal_number; }

bool wake_start(void) {
  struct sigaction action = { .sa_handler = on_guard }; /* no SA_RESTART: the write ends with EINTR */
  struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR2 };
  event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
  return sigaction(SIGUSR2, &action, NULL) == 0 && timer_create(CLOCK_MONOTONIC, &event, &guard) == 0;
}

static void set_guard(void) {
  static uint64_t expires_ns;
  uint64_t now = vmmc_now_ns();
  if (now + GUARD_NS / 2 < expires_ns) return;
  expires_ns = now + GUARD_NS;
  timer_settime(guard, 0, &(struct itimerspec){ .it_value.tv_nsec = GUARD_NS }, NULL);
}

bool wake_is_harmless(int fd) {
  char path[40], target[32] = "";
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  return readlink(path, target, sizeof target - 1) > 0 && !strcmp(target, "anon_inode:[eventfd]");
}

bool wake_descriptor(int fd) {
  struct pollfd writable = { fd, POLLOUT, 0 };
  if (poll(&writable, 1, 0) == 0) { /* its count is at the top: it is readable, and a write might wait */
    errno = EAGAIN;
    return false;
  }
  set_guard();
  return eventfd_write(fd, 1) == 0;
}

void wake_waker(struct endpoint *e, uint32_t number) {
  int *fd = &e->waker[number];
  if (*fd < 0) return;
  /* EAGAIN: its count is at the top, so it is readable already. */
  core_woke();
  if (wake_descriptor(*fd)) {
    COUNT(e, wakes, 1);
  } else if (errno == EINTR) {
    endpoint_nonsense(e, "event descriptor %u is full and was made to block; it is woken no more", number);
    close(*fd);
    *fd = -1;
  }
}

/*
 * False: nobody sleeps there.  Where all the sleepers wait in one set, one of them is woken, as in the kernel: it
 * looks at the set before it does anything else, and wakes the next when it leaves something (readiness.c).
 */
static bool wake_group(struct endpoint *e, uint32_t g) {
  struct vmmc_group_app *group = &app_header(e)->group[g];
  bool alone = atomic_load(&group->alone), asleep = atomic_load(&group->asleep);
  if (asleep) wake_word(e, &nic_header(e)->group_wake[g], alone ? 1 : INT32_MAX);
  if (asleep && alone) return true;
  uint64_t wakers = atomic_load(&group->wakers);
  for (uint64_t left = wakers; left; left = alone ? 0 : left & (left - 1)) wake_waker(e, (uint32_t)__builtin_ctzll(left));
  return asleep || wakers;
}

void wake_slot(struct endpoint *e, uint32_t slot, int whom) {
  struct vmmc_app_slot *a = app_slot(e, slot);
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  if (e->dying) return;
  if (whom & WAKE_READERS) core_gave(e);
  atomic_thread_fence(memory_order_seq_cst);
  /* A program that is being detached may not say any more who sleeps. */
  bool all = e->wrong;
  if ((whom & WAKE_READERS) && (all || atomic_load_explicit(&a->asleep_rx, memory_order_relaxed)))
    wake_word(e, &n->wake_rx, INT32_MAX);
  if ((whom & WAKE_WRITERS) && (all || atomic_load_explicit(&a->asleep_tx, memory_order_relaxed)))
    wake_word(e, &n->wake_tx, INT32_MAX);
  /* acquire: a set that the watch speaks of has told before whether it is alone in its group */
  uint64_t watch = atomic_load_explicit(&a->watch, memory_order_acquire);
  if (!watch) return;
  enter_event(e, slot);
  uint64_t exclusive = watch & atomic_load_explicit(&a->exclusive, memory_order_relaxed);
  for (watch &= ~exclusive; watch; watch &= watch - 1) wake_group(e, (uint32_t)__builtin_ctzll(watch));
  while (exclusive && !wake_group(e, (uint32_t)__builtin_ctzll(exclusive))) exclusive &= exclusive - 1;
}

void wake_completion(struct endpoint *e) {
  if (e->dying) return;
  atomic_thread_fence(memory_order_seq_cst);
  if (atomic_load_explicit(&app_header(e)->asleep_completion, memory_order_relaxed))
    wake_word(e, &nic_header(e)->wake_completion, INT32_MAX);
}

void wake_notification(struct endpoint *e) {
  if (e->dying) return;
  core_gave(e);
  atomic_thread_fence(memory_order_seq_cst);
  if (atomic_load_explicit(&app_header(e)->asleep_notification, memory_order_relaxed))
    wake_word(e, &nic_header(e)->wake_notification, INT32_MAX);
}

void wake_words(struct vmmc_nic_slot *slot) {
  _Atomic uint32_t *word[] = { &slot->wake_rx, &slot->wake_tx };
  for (int i = 0; i < 2; i++) {
    atomic_fetch_add(word[i], 1);
    vmmc_futex_wake_some(word[i], INT32_MAX);
  }
}

void wake_all(struct endpoint *e) {
  wake_word(e, &nic_header(e)->wake_completion, INT32_MAX);
  wake_word(e, &nic_header(e)->wake_notification, INT32_MAX);
  for (uint32_t g = 0; g < VMMC_GROUPS; g++) wake_word(e, &nic_header(e)->group_wake[g], INT32_MAX);
  for (uint32_t w = 0; w < VMMC_WAKERS; w++) wake_waker(e, w);
}
