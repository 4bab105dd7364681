/*
 * wake.c: waking programs.
 *
 * Every sleep in the library announces itself (a count or a bit in the app's segment) and then looks at
 * the state again; here the state is stored first, then comes a seq_cst fence, then the look at the
 * announcement.  One of the two sees the other.
 */
#include <sys/eventfd.h>

#include "nic.h"

static void wake_word(struct endpoint *e, _Atomic uint32_t *word) {
  /* One writer, so load and store.  release: the woken one sees what it was woken for. */
  atomic_store_explicit(word, atomic_load_explicit(word, memory_order_relaxed) + 1, memory_order_release);
  vmmc_futex_wake(word);
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

static void wake_group(struct endpoint *e, uint32_t g) {
  struct vmmc_group_app *group = &app_header(e)->group[g];
  if (atomic_load(&group->asleep)) wake_word(e, &nic_header(e)->group_wake[g]);
  for (uint64_t wakers = atomic_load(&group->wakers); wakers; wakers &= wakers - 1) {
    int fd = e->waker[__builtin_ctzll(wakers)];
    /* EAGAIN: its count is at the top, so it is readable already. */
    if (fd >= 0 && eventfd_write(fd, 1) == 0) COUNT(e, wakes, 1);
  }
}

void wake_slot(struct endpoint *e, uint32_t slot, int whom) {
  struct vmmc_app_slot *a = app_slot(e, slot);
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  if (e->dying) return;
  atomic_thread_fence(memory_order_seq_cst);
  if ((whom & WAKE_READERS) && atomic_load_explicit(&a->asleep_rx, memory_order_relaxed)) wake_word(e, &n->wake_rx);
  if ((whom & WAKE_WRITERS) && atomic_load_explicit(&a->asleep_tx, memory_order_relaxed)) wake_word(e, &n->wake_tx);
  uint64_t watch = atomic_load_explicit(&a->watch, memory_order_relaxed);
  if (!watch) return;
  enter_event(e, slot);
  for (; watch; watch &= watch - 1) wake_group(e, (uint32_t)__builtin_ctzll(watch));
}

void wake_completion(struct endpoint *e) {
  if (e->dying) return;
  atomic_thread_fence(memory_order_seq_cst);
  if (atomic_load_explicit(&app_header(e)->asleep_completion, memory_order_relaxed))
    wake_word(e, &nic_header(e)->wake_completion);
}

void wake_notification(struct endpoint *e) {
  if (e->dying) return;
  atomic_thread_fence(memory_order_seq_cst);
  if (atomic_load_explicit(&app_header(e)->asleep_notification, memory_order_relaxed))
    wake_word(e, &nic_header(e)->wake_notification);
}
