/*
 * give_back.c: the rings of idle connections go back to the machine.
 *
 * A connection that moved bytes is held in a list.  At each sweep, half a second apart, those that have not moved
 * since the one before are idle.  First the peer is asked (RECALL): credit that it does not use is void, and what
 * it has is acknowledged.  By the next sweep nothing can arrive outside a small window, and the ring's other pages
 * go; of the transmit ring, when all of it is acknowledged, all pages.  Then the connection leaves the list until
 * it moves again: an idle cluster has nothing held, and sleeps.
 *
 * A program that has died leaves what it sent and its peers have not read yet.  All other pages of its rings go at
 * the next sweep, those of each connection as its peer takes more, and the rest when it is over.
 */
#include <linux/membarrier.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "nic.h"

enum {
  SWEEP_NS = 500000000,
  TURNS = 256, /* of the duty cycle for each look at the clock */
  SHARE = 64,  /* slots of a sweep in one turn, since giving pages back is slow */
};

static uint64_t due_ns; /* when the next sweep begins; 0: nothing is held */
static bool sweeping, look_at_clock;

uint64_t give_back_due_ns(void) {
  look_at_clock = true; /* whoever asks is about to sleep until then */
  bool held = false; /* nothing may be, any more: its endpoints are gone */
  for (uint32_t i = 0; i < nic.live_count; i++) held |= nic.endpoint[nic.live[i]]->first_held != 0;
  if (!held) due_ns = 0;
  return due_ns;
}

static void hold(struct endpoint *e, uint32_t slot) {
  struct slot_work *work = &e->work[slot];
  work->held = true;
  work->next_held = e->first_held;
  e->first_held = slot + 1;
  if (!due_ns) due_ns = vmmc_now_ns() + SWEEP_NS;
}

void give_back_later(struct endpoint *e, uint32_t slot) {
  if (__builtin_expect(!e->work[slot].held, 0)) hold(e, slot);
}

/* The pages of the stream's bytes [from, to), which is a ring's length at most, in a ring that begins with `base`. */
static void give_back_bytes(char *ring, uint64_t base, uint64_t from, uint64_t to) {
  while (from < to) {
    uint64_t offset = vmmc_ring_offset(from, base), run = VMMC_RING - offset;
    if (run > to - from) run = to - from;
    /* What cannot be given back stays allocated; it costs memory, and nothing else. */
    madvise(ring + offset, run, MADV_REMOVE);
    from += run;
  }
}

/* ---- default buffers: the NIC's own ---- */

static void give_back_places(struct endpoint *e, uint32_t slot, uint64_t from, uint64_t to) {
  uint64_t base = atomic_load_explicit(&nic_slot(e, slot)->ring_base, memory_order_relaxed); /* our own */
  give_back_bytes(default_buffer(e, slot), base, from, to);
}

void give_back_unused(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  uint64_t end = c->state == CONNECTION_LISTENING ? c->placed : c->told;
  uint64_t from = c->consumed / VMMC_PAGE * VMMC_PAGE, to = (end + VMMC_PAGE - 1) / VMMC_PAGE * VMMC_PAGE;
  if (to - from >= VMMC_RING) return;
  /* All of [from, to) was committed when it was told.  The bounds go before the pages, and in such an order that
   * a successor never takes a page for allocated that is not. */
  if (to > c->committed_to) { /* the whole ring was committed, some rounds ago */
    c->committed_to = to;
    in_order();
    c->committed_from = from;
  } else {
    c->committed_from = from;
    in_order();
    c->committed_to = to;
  }
  in_order();
  give_back_places(e, slot, to, from + VMMC_RING);
}

static void give_back_all(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  c->committed_to = c->committed_from;
  in_order();
  give_back_places(e, slot, 0, VMMC_RING);
}

/* ---- transmit rings: the program's, see "Idle rings" in vmmc_layout.h ---- */

static char *transmit_ring(struct endpoint *e, uint32_t slot) {
  return e->app + VMMC_APP_RINGS + (uint64_t)slot * VMMC_RING;
}

/* Of a program that is gone: all but what its peer may have to copy yet.  What comes is not stored (stream.c). */
static void give_back_left(struct endpoint *e, uint32_t slot, const struct half *h) {
  struct connection *c = connection_of(e, slot);
  give_back_all(e, slot);
  if (c->state == CONNECTION_NONE) {
    give_back_bytes(transmit_ring(e, slot), 0, 0, VMMC_RING);
    return;
  }
  uint64_t base = atomic_load_explicit(&app_slot(e, slot)->ring_base, memory_order_relaxed); /* whatever it says */
  uint64_t from = c->acknowledged / VMMC_PAGE * VMMC_PAGE, to = (h->written + VMMC_PAGE - 1) / VMMC_PAGE * VMMC_PAGE;
  if (to - from < VMMC_RING) give_back_bytes(transmit_ring(e, slot), base, to, from + VMMC_RING);
}

void give_back_from_dead(struct endpoint *e) {
  for (uint32_t slot = 0; slot < e->own->active_end; slot++) give_back_later(e, slot);
  for (uint32_t slot = VMMC_ACTIVE_SLOTS; slot < e->own->passive_end; slot++) give_back_later(e, slot);
}

static void take_transmit_rings(struct endpoint *e, const uint32_t *slots, uint32_t count) {
  if (!count || !app_header(e)->barriers) return;
  for (uint32_t i = 0; i < count; i++) {
    _Atomic uint32_t *taken = &nic_slot(e, slots[i])->ring_taken;
    atomic_store_explicit(taken, atomic_load_explicit(taken, memory_order_relaxed) | 1, memory_order_relaxed);
  }
  /* Orders our stores before our looks, too. */
  bool ordered = syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0) == 0;
  for (uint32_t i = 0; i < count; i++) {
    struct vmmc_app_slot *a = app_slot(e, slots[i]);
    struct connection *c = connection_of(e, slots[i]);
    /* acquire: who has stopped sending has stored `written` */
    bool quiet = ordered && !atomic_load_explicit(&a->sending, memory_order_acquire) &&
                 atomic_load_explicit(&a->generation, memory_order_relaxed) == c->generation &&
                 atomic_load_explicit(&a->written, memory_order_relaxed) == c->acknowledged;
    /* Also what it was not told in steps: its ring begins anew.  release: the peer has copied what was there. */
    if (quiet) {
      atomic_store_explicit(&nic_slot(e, slots[i])->acknowledged, c->acknowledged, memory_order_release);
      madvise(transmit_ring(e, slots[i]), VMMC_RING, MADV_REMOVE);
    }
    _Atomic uint32_t *taken = &nic_slot(e, slots[i])->ring_taken;
    /* release: the pages are gone before the program may store there */
    atomic_store_explicit(taken, atomic_load_explicit(taken, memory_order_relaxed) + 1, memory_order_release);
  }
}

void give_back_recover(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  _Atomic uint32_t *taken = &nic_slot(e, slot)->ring_taken;
  uint32_t number = atomic_load_explicit(taken, memory_order_relaxed);
  if (number % 2) atomic_store_explicit(taken, number + 1, memory_order_release);
  if (c->committed_to != c->committed_from || c->transmitted) give_back_later(e, slot);
}

/* ---- sweeping ---- */

/* Looks at a held slot.  True: it need not be held until it moves again.  *quiet: its transmit ring may go. */
static bool settle(struct endpoint *e, uint32_t slot, bool *quiet) {
  struct connection *c = connection_of(e, slot);
  struct slot_work *work = &e->work[slot];
  struct half h = connection_half(e, slot);
  bool free = c->state == CONNECTION_NONE;
  if (e->gone) {
    give_back_left(e, slot, &h);
    return true;
  }
  /* Positions only grow: their sum stands still when none of them moves. */
  uint64_t seen = free ? UINT64_MAX - c->generation : h.written + h.consumed + c->transmitted + c->placed + 1;
  if (work->seen != seen) {
    work->seen = seen;
    work->recalled = false;
    return false;
  }
  if (free) give_back_all(e, slot);
  if (e->dying || h.consumed < c->consumed || h.consumed > c->placed) return true;
  if (c->state == CONNECTION_LISTENING) {
    connection_entries_taken(c, &h);
    give_back_unused(e, slot);
  }
  if (c->state != CONNECTION_ESTABLISHED) return true;
  c->consumed = h.consumed;
  if (connection_wants_to_say(e, slot, &h)) { /* credit for which there was no memory, say */
    connection_enqueue(e, slot);
    return false;
  }
  if (c->placed != h.consumed || h.written != c->transmitted) return true; /* not idle: it waits for a reader */
  bool recall = c->told > c->consumed + VMMC_FIRST_WINDOW || c->acknowledged != c->transmitted;
  if (recall && !work->recalled) {
    work->recalled = true;
    c->flags |= SAY_IDLE;
    connection_enqueue(e, slot);
    return false;
  }
  connection_rewind(e, slot, 0);
  give_back_unused(e, slot);
  *quiet = c->transmitted && c->acknowledged == c->transmitted;
  return true;
}

/* A share of the slots of one endpoint. */
static void sweep(struct endpoint *e) {
  uint32_t quiet[SHARE], quiet_count = 0;
  for (uint32_t looks = 0; e->first_swept && looks < SHARE; looks++) {
    uint32_t slot = e->first_swept - 1;
    struct slot_work *work = &e->work[slot];
    bool is_quiet = false;
    e->first_swept = work->next_held;
    if (settle(e, slot, &is_quiet))
      work->held = false;
    else
      hold(e, slot);
    if (is_quiet) quiet[quiet_count++] = slot;
  }
  take_transmit_rings(e, quiet, quiet_count);
}

int give_back_work(void) {
  static uint32_t turns;
  if (!sweeping) {
    if (!due_ns || (++turns % TURNS && !look_at_clock)) return 0;
    look_at_clock = false;
    if (vmmc_now_ns() < due_ns) return 0;
    due_ns = 0; /* until something is held on */
    sweeping = true;
    for (uint32_t i = 0; i < nic.live_count; i++) {
      struct endpoint *e = nic.endpoint[nic.live[i]];
      e->first_swept = e->first_held;
      e->first_held = 0;
    }
  }
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    if (!e->first_swept) continue;
    sweep(e);
    return 1;
  }
  sweeping = false;
  return 0;
}
