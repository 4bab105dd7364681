/*
 * slot.c: who holds which slot of an endpoint.
 *
 * bind, listen and connect take an active slot, accept adopts the passive one that the NIC filled.  A slot
 * that was given back is used again when the NIC has said VMMC_FREE for that generation: the last one
 * freed first, since its pages are committed already.
 */
#include "slot.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "connection.h"

enum {
  REAP_LOOKS = 8,              /* slots given back that are looked at when one is needed */
  SPARE_RINGS_BYTES = 4 << 20, /* rings of slots out of use keep their pages up to this many bytes in all */
  SLOTS_PER_PAGE = VMMC_PAGE / sizeof(struct vmmc_app_slot),
};

struct closed_slot {
  uint32_t slot, generation;
};

/* An endpoint's slots.  Private memory, zero where never used; everything under `lock` but memory[]. */
struct slots {
  pthread_mutex_t lock;
  uint32_t fresh;                              /* active slots below this were used before */
  uint32_t free_count;                         /* of free[], last freed first */
  uint32_t closed_head, closed_count;          /* of closed[], a ring */
  uint64_t spare_bytes;                        /* ring bytes that slots out of use keep */
  uint16_t free[VMMC_ACTIVE_SLOTS];
  uint8_t page_committed[VMMC_SLOTS / SLOTS_PER_PAGE];
  struct closed_slot closed[VMMC_SLOTS];       /* given back, not yet seen VMMC_FREE */
  struct slot_memory memory[VMMC_SLOTS];
};

static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;

static struct slots *slots_of(struct endpoint *e) {
  /* acquire: pairs with the release below */
  return atomic_load_explicit((_Atomic(void *) *)&e->sockets, memory_order_acquire);
}

static struct slots *slots_make(struct endpoint *e) {
  struct slots *made = slots_of(e);
  if (made) return made;
  critical_lock(&making);
  made = slots_of(e);
  if (!made) {
    made = mmap(NULL, sizeof *made, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) {
      made = NULL;
    } else {
      pthread_mutex_init(&made->lock, NULL);
      atomic_store_explicit((_Atomic(void *) *)&e->sockets, made, memory_order_release);
    }
  }
  critical_unlock(&making);
  return made;
}

struct slot_memory *slot_memory(struct endpoint *e, uint32_t slot) { return &slots_of(e)->memory[slot]; }

/* Both halves of a slot lie in pages that are there.  Called with the lock held. 0 or -ENOBUFS. */
static int commit_slot(struct endpoint *e, struct slots *slots, uint32_t slot) {
  uint8_t *committed = &slots->page_committed[slot / SLOTS_PER_PAGE];
  if (*committed) return 0;
  int error = endpoint_commit(app_slot(e, slot), sizeof(struct vmmc_app_slot), true);
  if (!error) error = endpoint_commit(nic_slot(e, slot), sizeof(struct vmmc_nic_slot), false);
  if (!error) *committed = 1;
  return error;
}

/* The slot is out of use: its ring's pages wait for the next user, who begins at position 0, or go back when
 * they lie elsewhere or many wait. */
static void keep_or_return_ring(struct endpoint *e, struct slots *slots, uint32_t slot) {
  struct slot_memory *memory = &slots->memory[slot];
  uint64_t length = memory->committed_to - memory->committed_from;
  uint64_t base = atomic_load_explicit(&app_slot(e, slot)->ring_base, memory_order_relaxed);
  bool at_start = vmmc_ring_offset(memory->committed_from, base) == 0 || length == VMMC_RING;
  memory->committed_from = memory->committed_to = 0;
  if (!length) return;
  if ((!at_start || slots->spare_bytes + length > SPARE_RINGS_BYTES) &&
      madvise(transmit_ring(e, slot), VMMC_RING, MADV_REMOVE) == 0)
    return;
  memory->committed_to = at_start ? length : 0;
  memory->spare = true;
  slots->spare_bytes += memory->committed_to;
}

static void take_ring(struct slots *slots, uint32_t slot) {
  struct slot_memory *memory = &slots->memory[slot];
  if (!memory->spare) return;
  memory->spare = false;
  slots->spare_bytes -= memory->committed_to;
}

/* Looks at a few slots that were given back: has the NIC done with them?  In turn, so that one which
 * lingers does not hide those behind it.  Called with the lock held. */
static void reap(struct endpoint *e, struct slots *slots) {
  uint32_t looks = slots->closed_count < REAP_LOOKS ? slots->closed_count : REAP_LOOKS;
  for (; looks; looks--) {
    struct closed_slot entry = slots->closed[slots->closed_head];
    slots->closed_head = (slots->closed_head + 1) % VMMC_SLOTS;
    slots->closed_count--;
    struct slot_memory *memory = &slots->memory[entry.slot];
    if (memory->generation != entry.generation) continue; /* a passive one that was accepted into again */
    const struct vmmc_nic_slot *n = nic_slot(e, entry.slot);
    bool active = entry.slot < VMMC_ACTIVE_SLOTS;
    /* The state first (acquire pairs with the NIC's release): a passive slot moves on by itself. */
    bool free = atomic_load_explicit(&n->state, memory_order_acquire) == VMMC_FREE;
    bool same = atomic_load_explicit(&n->generation, memory_order_acquire) == entry.generation;
    if (active ? free && same : free || !same) {
      keep_or_return_ring(e, slots, entry.slot);
      if (active) slots->free[slots->free_count++] = (uint16_t)entry.slot;
    } else {
      slots->closed[(slots->closed_head + slots->closed_count++) % VMMC_SLOTS] = entry;
    }
  }
}

/* Our half of a slot, empty; `generation` last, which makes it count.  asleep_rx and asleep_tx count threads, not
 * the holder's: of the last one some may still be about to see that it is over, and take themselves off. */
static void fill_slot(struct vsocket *s, struct endpoint *e, uint32_t slot, uint32_t generation) {
  struct vmmc_app_slot *a = app_slot(e, slot);
  atomic_store_explicit(&a->written, 0, memory_order_relaxed);
  atomic_store_explicit(&a->ring_base, 0, memory_order_relaxed);
  atomic_store_explicit(&a->shut, s->linger_s == 0 ? VMMC_ABORT_AT_END : 0, memory_order_relaxed);
  atomic_store_explicit(&a->sending, 0, memory_order_relaxed);
  atomic_store_explicit(&a->wanted, 0, memory_order_relaxed);
  atomic_store_explicit(&a->send_window, s->send_buffer, memory_order_relaxed);
  atomic_store_explicit(&a->consumed, 0, memory_order_relaxed);
  atomic_store_explicit(&a->post, 0, memory_order_relaxed);
  atomic_store_explicit(&a->receive_window, s->receive_buffer, memory_order_relaxed);
  uint64_t keepalive = socket_keepalive(s);
  atomic_store_explicit(&a->keepalive, keepalive, memory_order_relaxed);
  s->endpoint = e;
  s->slot = slot;
  s->request = atomic_load_explicit(&a->request, memory_order_relaxed); /* counts on from its last user */
  s->rung = s->outstanding = 0;
  s->full_at = 0;
  s->error_taken = 0;
  struct slot_memory *memory = slot_memory(e, slot);
  atomic_store_explicit(&memory->socket, s, memory_order_release);
  /* release: the NIC that sees the generation sees the rest */
  atomic_store_explicit(&a->generation, generation, memory_order_release);
  s->generation = generation;
  critical_lock(&s->slot_lock);
  s->has_slot = true; /* what is set from here on is set there as well; what was set before: */
  atomic_store(&a->exclusive, atomic_load(&s->exclusive));
  atomic_store(&a->watch, atomic_load(&s->watch));
  critical_unlock(&s->slot_lock);
  if (keepalive) endpoint_ring_slot(e, slot); /* of an accepted connection the NIC would not look at it */
}

int slot_take(struct vsocket *s) {
  if (s->generation) return endpoint_served(s->endpoint);
  struct endpoint *e = endpoint_default();
  if (!e) return -errno;
  int served = endpoint_served(e);
  if (served) return served;
  struct slots *slots = slots_make(e);
  if (!slots) return -ENOMEM;
  critical_lock(&slots->lock);
  reap(e, slots);
  int error = 0;
  uint32_t slot = 0, generation = 0;
  if (!slots->free_count && slots->fresh == VMMC_ACTIVE_SLOTS) {
    error = -ENOBUFS;
  } else {
    slot = slots->free_count ? slots->free[slots->free_count - 1] : slots->fresh;
    error = commit_slot(e, slots, slot);
  }
  if (!error) {
    if (slots->free_count)
      slots->free_count--;
    else
      slots->fresh++;
    take_ring(slots, slot);
    generation = slots->memory[slot].generation + 1;
    if (!generation) generation = 1;
    slots->memory[slot].generation = generation; /* under the lock: reap looks at it */
  }
  critical_unlock(&slots->lock);
  if (!error) fill_slot(s, e, slot, generation);
  return error;
}

struct vmmc_app_slot *slot_hold(struct vsocket *s) {
  critical_lock(&s->slot_lock);
  return s->has_slot && connection_usable(s) ? app_slot(s->endpoint, s->slot) : NULL;
}

void slot_let_go(struct vsocket *s) { critical_unlock(&s->slot_lock); }

void slot_leave(struct vsocket *s, uint32_t bits) {
  critical_lock(&s->slot_lock);
  s->has_slot = false;
  critical_unlock(&s->slot_lock);
  /* First: once the NIC knows, the slot may be accepted into, and what is stored here after that would be in place
   * of its next holder, who then hears of no event. */
  atomic_store_explicit(&slot_memory(s->endpoint, s->slot)->socket, NULL, memory_order_relaxed);
  /* seq_cst: after it, and after the positions, which are final */
  atomic_fetch_or(&app_slot(s->endpoint, s->slot)->shut, bits);
  endpoint_ring_slot(s->endpoint, s->slot);
}

void slot_give_back(struct vsocket *s) {
  struct slots *slots = slots_of(s->endpoint);
  critical_lock(&slots->lock);
  /* A passive slot waits here only for its ring's pages, and may stand here several times: it never takes
   * the room that the active ones need. */
  if (s->slot < VMMC_ACTIVE_SLOTS || slots->closed_count < VMMC_SLOTS - VMMC_ACTIVE_SLOTS)
    slots->closed[(slots->closed_head + slots->closed_count++) % VMMC_SLOTS] =
        (struct closed_slot){ s->slot, s->generation };
  reap(s->endpoint, slots);
  critical_unlock(&slots->lock);
}

int slot_adopt(struct vsocket *s, struct endpoint *e, struct vmmc_accept_entry entry) {
  struct slots *slots = slots_of(e);
  critical_lock(&slots->lock);
  reap(e, slots);
  int error = commit_slot(e, slots, entry.slot);
  if (!error) {
    struct slot_memory *memory = &slots->memory[entry.slot];
    /* Its last holder, with whom the NIC is done, may not have given it back yet, or not have been looked at. */
    if (memory->generation && !memory->spare) keep_or_return_ring(e, slots, entry.slot);
    take_ring(slots, entry.slot);
    memory->generation = entry.generation;
  }
  critical_unlock(&slots->lock);
  if (!error) fill_slot(s, e, entry.slot, entry.generation);
  return error;
}

struct vsocket *slot_holder(struct endpoint *e, uint32_t slot) {
  struct slots *slots = slots_of(e);
  /* acquire: a holder that is found is filled */
  if (!slots || slot >= VMMC_SLOTS) return NULL;
  return atomic_load_explicit(&slots->memory[slot].socket, memory_order_acquire);
}

void slots_before_fork(void) { critical_lock(&making); }
void slots_after_fork(void) { critical_unlock(&making); }
