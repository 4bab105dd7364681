/*
 * keepalive.c: SO_KEEPALIVE.  A connection that asked for it, and has been silent, asks its peer whether it is
 * there: by a CREDIT that a NIC which does not know the connection answers with a reset, and any NIC that lives
 * acknowledges.  Only such connections are in the list, and nothing is looked at before it is due.
 */
#include <stdlib.h>

#include "nic.h"

struct watched {
  uint32_t index, serial, slot, generation;
  uint32_t unanswered; /* times it was asked */
  uint64_t seen;       /* positions when it was last looked at */
  uint64_t asked;      /* packets that the peer has taken once it has answered; 0: not asked */
  uint64_t due_ns;
};
static struct watched *list;
static uint32_t count, size;
enum { TURNS = 256 }; /* of the duty cycle for each look at the clock */
static uint64_t next_ns = UINT64_MAX; /* when something is due */
static bool look_at_clock;

uint64_t keepalive_due(void) {
  look_at_clock = true; /* whoever asks is about to sleep until then */
  return next_ns;
}

static uint64_t setting(struct endpoint *e, uint32_t slot) {
  return atomic_load_explicit(&app_slot(e, slot)->keepalive, memory_order_relaxed);
}
static uint64_t idle_ns(uint64_t setting) { return (setting & 0xffff) * 1000000000u; }
static uint64_t interval_ns(uint64_t setting) { return (setting >> 16 & 0xffff) * 1000000000u; }

static struct watched *find(struct endpoint *e, uint32_t slot) {
  for (uint32_t i = 0; i < count; i++)
    if (list[i].index == e->index && list[i].serial == e->serial && list[i].slot == slot) return &list[i];
  return NULL;
}

void keepalive_watch(struct endpoint *e, uint32_t slot) {
  struct slot_work *work = &e->work[slot];
  uint64_t set = setting(e, slot);
  uint32_t generation = connection_of(e, slot)->generation;
  if (set == work->keepalive && (!set || generation == work->kept_alive)) return;
  if (!set) return; /* found out when it is due */
  struct watched *w = work->keepalive ? find(e, slot) : NULL;
  if (!w && count == size) {
    uint32_t larger = size ? size * 2 : 64;
    struct watched *moved = realloc(list, larger * sizeof *list);
    if (!moved) {
      log_event("error", "out of memory: a connection of endpoint %u is not kept alive", e->index);
      return;
    }
    list = moved;
    size = larger;
  }
  if (!w) w = &list[count++];
  *w = (struct watched){ .index = e->index, .serial = e->serial, .slot = slot, .generation = generation,
                         .due_ns = vmmc_now_ns() + idle_ns(set) };
  if (w->due_ns < next_ns) next_ns = w->due_ns;
  work->keepalive = set;
  work->kept_alive = generation;
}

/* One that is due.  False: it need not be watched any more. */
static bool look(struct watched *w, struct endpoint *e, uint64_t now_ns) {
  struct connection *c = e ? connection_of(e, w->slot) : NULL;
  uint64_t set = e ? setting(e, w->slot) : 0;
  if (!set || e->dying || c->generation != w->generation || c->state == CONNECTION_NONE || c->state == CONNECTION_DEAD)
    return false;
  struct link *link = c->state == CONNECTION_ESTABLISHED ? link_to(c->far_node) : NULL;
  uint64_t seen = c->placed + c->far_limit + c->acknowledged;
  if (!link || seen != w->seen || (w->asked && link_acknowledged(link) >= w->asked)) {
    w->seen = seen;
    w->asked = w->unanswered = 0;
    w->due_ns = now_ns + idle_ns(set);
    return true;
  }
  if (w->unanswered >= set >> 32) {
    connection_abandon(e, w->slot, ETIMEDOUT); /* should it come back, it is told */
    return false;
  }
  if (!w->asked) {
    w->asked = link_tail(link) + 1;
    c->flags |= TELL_AGAIN;
    connection_enqueue(e, w->slot);
  }
  w->unanswered++;
  w->due_ns = now_ns + interval_ns(set);
  return true;
}

int keepalive_work(void) {
  static uint32_t turns;
  if (next_ns == UINT64_MAX || (++turns % TURNS && !look_at_clock)) return 0;
  look_at_clock = false;
  uint64_t now_ns = vmmc_now_ns();
  if (now_ns < next_ns) return 0;
  next_ns = UINT64_MAX;
  for (uint32_t i = 0; i < count; i++) {
    struct endpoint *e = endpoint_find(list[i].index, list[i].serial);
    if (list[i].due_ns <= now_ns && !look(&list[i], e, now_ns)) {
      if (e) e->work[list[i].slot].keepalive = 0;
      list[i--] = list[--count];
      continue;
    }
    if (list[i].due_ns < next_ns) next_ns = list[i].due_ns;
  }
  return 1;
}
