/*
 * connection.c: the life of a stream connection, from request to CLOSED.
 *
 * Nothing here is an event that could be lost: the app's half of the slot says what the app wants, the
 * connection (own.h) says what the peer was told, and connection_transmit says what is missing.  So a
 * doorbell may be seen twice, and a successor goes on where its predecessor was killed.
 */
#include <string.h>

#include "nic.h"

static struct packet_end end_of(const struct endpoint *e, uint32_t slot) {
  return (struct packet_end){ e->index, e->serial, slot, connection_of(e, slot)->generation };
}

static bool is_passive(uint32_t slot) { return slot >= VMMC_ACTIVE_SLOTS; }

struct half connection_half(struct endpoint *e, uint32_t slot) {
  struct vmmc_app_slot *a = app_slot(e, slot);
  struct connection *c = connection_of(e, slot);
  struct half h = { 0 };
  /* acquire: the app fills its half before it stores the generation */
  if (atomic_load_explicit(&a->generation, memory_order_acquire) == c->generation) {
    /* shut first: VMMC_SHUT_WRITE says that `written`, read after it, is final (acquire) */
    h.shut = atomic_load_explicit(&a->shut, memory_order_acquire);
    h.written = atomic_load_explicit(&a->written, memory_order_acquire);
    h.consumed = atomic_load_explicit(&a->consumed, memory_order_acquire);
  } else if (e->dying) {
    h.shut = VMMC_ABORT; /* never accepted by the program */
  }
  if (e->dying) {
    bool over = (c->flags & SAID_FIN) && (c->flags & HEARD_FIN); /* nothing is left to reset */
    if ((h.shut & VMMC_ABORT_AT_END) && !(h.shut & VMMC_CLOSED) && !over) h.shut |= VMMC_ABORT;
    h.shut |= VMMC_SHUT_WRITE | VMMC_CLOSED;
  }
  return h;
}

/* ---- memory ---- */

bool connection_commit(struct endpoint *e, uint32_t slot, uint64_t upto) {
  if (e->gone) return true; /* what comes is not stored */
  struct connection *c = connection_of(e, slot);
  uint64_t base = atomic_load_explicit(&nic_slot(e, slot)->ring_base, memory_order_relaxed); /* our own */
  upto = (upto + VMMC_PAGE - 1) / VMMC_PAGE * VMMC_PAGE;
  if (upto > c->committed_from + VMMC_RING) upto = c->committed_from + VMMC_RING;
  while (c->committed_to < upto) { /* twice where the range goes around the ring's end */
    uint64_t offset = vmmc_ring_offset(c->committed_to, base), run = VMMC_RING - offset;
    if (run > upto - c->committed_to) run = upto - c->committed_to;
    if (!segment_commit(e->nic_fd, VMMC_NIC_RINGS + (uint64_t)slot * VMMC_RING + offset, run)) return false;
    c->committed_to += run;
  }
  give_back_later(e, slot);
  return true;
}

/* How much of the default buffer is allocated.  A predecessor may have been killed between the two bounds. */
static uint64_t committed(const struct connection *c) {
  uint64_t length = c->committed_to > c->committed_from ? c->committed_to - c->committed_from : 0;
  return length < VMMC_RING ? length : VMMC_RING;
}

void connection_rewind(struct endpoint *e, uint32_t slot, uint64_t after) {
  struct connection *c = connection_of(e, slot);
  _Atomic uint64_t *base = &nic_slot(e, slot)->ring_base;
  uint64_t now = atomic_load_explicit(base, memory_order_relaxed), length = committed(c);
  bool at_base = c->committed_from == now || length == VMMC_RING;
  if (c->placed - now < after || (!at_base && after)) return;
  if (connection_half(e, slot).consumed != c->placed) return;
  uint64_t next = c->placed / VMMC_PAGE * VMMC_PAGE;
  if (!at_base) { /* a NIC was killed in here, or memory was short: as much as is promised, where the ring begins */
    length = (c->told - next + VMMC_PAGE - 1) / VMMC_PAGE * VMMC_PAGE;
    if (length > VMMC_RING) length = VMMC_RING;
    if (!segment_commit(e->nic_fd, VMMC_NIC_RINGS + (uint64_t)slot * VMMC_RING, length)) return;
  }
  /* In this order a successor finds no more than there is, before the base moves and after it: first what lies
   * before `next`, then nothing.  Credit for [placed, told) stays good: as much is allocated. */
  c->committed_to = next;
  in_order();
  c->committed_from = next;
  in_order();
  atomic_store_explicit(base, next, memory_order_relaxed); /* published by `placed` */
  in_order();
  c->committed_to = next + length;
}

/* The slot's next connection begins at position 0, and what is allocated there stays. */
static void reset_ring(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  _Atomic uint64_t *base = &nic_slot(e, slot)->ring_base;
  uint64_t length = committed(c);
  bool stays = length == VMMC_RING ||
               vmmc_ring_offset(c->committed_from, atomic_load_explicit(base, memory_order_relaxed)) == 0;
  /* In this order a successor finds no more than there is, which is nothing when the end comes first. */
  c->committed_to = 0;
  in_order();
  c->committed_from = 0;
  in_order();
  atomic_store_explicit(base, 0, memory_order_relaxed); /* seen by the app with the connection's generation */
  in_order();
  if (stays) c->committed_to = length;
  /* What is allocated elsewhere in the ring is left to the next sweep that finds the connection idle. */
}

/* The pages of the control structures of all slots up to this one. */
static bool commit_slot(struct endpoint *e, uint32_t slot) {
  uint32_t *end = is_passive(slot) ? &e->own->passive_end : &e->own->active_end;
  if (slot < *end) return true;
  uint64_t first = *end, count = slot + 1 - first;
  if (!segment_commit(e->nic_fd, VMMC_NIC_SLOTS + first * sizeof(struct vmmc_nic_slot), count * sizeof(struct vmmc_nic_slot)) ||
      !segment_commit(e->own_fd, offsetof(struct own, connection) + first * sizeof(struct connection),
                      count * sizeof(struct connection)))
    return false;
  /* The app commits its halves when it takes a slot; of those that we take we read them before it does. */
  if (is_passive(slot) && !segment_commit(e->app_fd, VMMC_APP_SLOTS + first * sizeof(struct vmmc_app_slot),
                                          count * sizeof(struct vmmc_app_slot)))
    return false;
  *end = slot + 1;
  return true;
}

/* ---- a slot begins and ends ---- */

/* Empties a free slot for its next connection, which is not there before enter(). */
static void prepare(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  c->flags = 0;
  /* What was requested, and the committed memory, go on from one connection to the next. */
  memset(&c->local, 0, offsetof(struct connection, committed_from) - offsetof(struct connection, local));
  memset(c->waiting, 0, sizeof c->waiting);
  c->window = VMMC_FIRST_WINDOW;
  /* In the app's sight this slot is not its generation's until publish(). */
  atomic_store_explicit(&n->acknowledged, 0, memory_order_relaxed);
  atomic_store_explicit(&n->transmitted, 0, memory_order_relaxed);
  atomic_store_explicit(&n->placed, 0, memory_order_relaxed);
  atomic_store_explicit(&n->status, 0, memory_order_relaxed);
  atomic_store_explicit(&n->redirected_post, 0, memory_order_relaxed);
  atomic_store_explicit(&n->redirected_from, 0, memory_order_relaxed);
  atomic_store_explicit(&n->redirected_to, 0, memory_order_relaxed);
  n->local = n->peer = (struct vmmc_address){ 0 };
  n->reply_error = 0;
  struct slot_work *work = &e->work[slot];
  work->endpoint = e;
  work->slot = slot;
  work->work.transmit = connection_transmit;
  work->work.lane = e->index;
}

/* The prepared connection is there, from one store to the next. */
static void enter(struct endpoint *e, uint32_t slot, uint32_t generation, uint32_t state) {
  struct connection *c = connection_of(e, slot);
  struct connection begun = { .generation = generation, .state = state };
  in_order();
  *(volatile uint64_t *)&c->identity = begun.identity;
  in_order();
  e->own->open++;
}

/* Shows the app its slot: the generation after all that it covers (release). */
static void publish(struct endpoint *e, uint32_t slot, uint32_t state) {
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  atomic_store_explicit(&n->state, state, memory_order_relaxed);
  atomic_store_explicit(&n->generation, connection_of(e, slot)->generation, memory_order_release);
}

/* By node: connections that were welcomed and have no answer yet. */
static uint32_t awaited[VMMC_NODES_MAX];

static bool is_connecting(const struct connection *c) {
  return c->state == CONNECTION_CONNECTING || c->state == CONNECTION_BUSY;
}

static void await(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  if (e->work[slot].awaited || !is_connecting(c) || !(c->flags & WELCOMED)) return;
  e->work[slot].awaited = true;
  awaited[c->far_node]++;
}

static void await_no_more(struct endpoint *e, uint32_t slot) {
  if (!e->work[slot].awaited) return;
  e->work[slot].awaited = false;
  awaited[connection_of(e, slot)->far_node]--;
}

static void finish(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  await_no_more(e, slot);
  port_release(c);
  if (is_passive(slot)) port_left(c);
  if (e->work[slot].remote) remote_release(e->work[slot].remote);
  e->work[slot].remote = NULL;
  in_order();
  c->state = CONNECTION_NONE;
  in_order();
  e->own->open--;
  if (is_passive(slot)) {
    c->next_free = e->own->free_passive;
    e->own->free_passive = slot + 1;
  }
  /* release: the app that finds it free finds everything else done with */
  atomic_store_explicit(&nic_slot(e, slot)->state, VMMC_FREE, memory_order_release);
  wake_slot(e, slot, WAKE_WRITERS); /* a close that lingers waits for this */
  if (c->committed_to > c->committed_from || e->gone) give_back_later(e, slot);
}

/* A slot for a connection that this node accepts; VMMC_SLOTS: none is free. */
static uint32_t take_passive(struct endpoint *e) {
  struct own *own = e->own;
  uint32_t slot = own->free_passive ? own->free_passive - 1 : own->passive_end;
  if (slot >= VMMC_SLOTS || !commit_slot(e, slot)) return VMMC_SLOTS;
  reset_ring(e, slot);
  if (!connection_commit(e, slot, VMMC_FIRST_WINDOW)) {
    if (!own->free_passive) { /* fresh: keep it for later */
      connection_of(e, slot)->next_free = 0;
      own->free_passive = slot + 1;
    }
    return VMMC_SLOTS;
  }
  if (own->free_passive) own->free_passive = connection_of(e, slot)->next_free;
  return slot;
}

/* ---- what the peer and the app are told ---- */

void connection_enqueue(struct endpoint *e, uint32_t slot) {
  struct link *link = link_to(connection_of(e, slot)->far_node);
  if (link)
    link_enqueue(link, &e->work[slot].work);
  else /* no memory for the link, or no such node */
    connection_fail(e, slot, errno == ENOSPC || errno == ENOMEM ? ENOBUFS : EHOSTUNREACH);
}

static void set_status(struct endpoint *e, uint32_t slot, uint32_t bits) {
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  /* release: after the positions that it speaks of */
  atomic_store_explicit(&n->status, atomic_load_explicit(&n->status, memory_order_relaxed) | bits, memory_order_release);
}

/* The peer may yet have to copy from the ring, which will be the slot's next connection's. */
static void withdraw(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  struct packet_end end = end_of(e, slot);
  if (c->transmitted != c->acknowledged) link_withdraw(c->far_node, &end);
}

void connection_fail(struct endpoint *e, uint32_t slot, int error) {
  struct connection *c = connection_of(e, slot);
  if (c->state == CONNECTION_NONE || c->state == CONNECTION_DEAD) return;
  await_no_more(e, slot);
  /* The errno before the state: a successor shows the app the state again, and knows no errno. */
  if (!(atomic_load_explicit(&nic_slot(e, slot)->status, memory_order_relaxed) & VMMC_ERRNO_MASK))
    set_status(e, slot, (uint32_t)error);
  in_order();
  c->state = CONNECTION_DEAD;
  in_order();
  withdraw(e, slot);
  atomic_store_explicit(&nic_slot(e, slot)->state, VMMC_DEAD, memory_order_release);
  wake_slot(e, slot, WAKE_BOTH);
  if ((c->flags & APP_CLOSED) || (connection_half(e, slot).shut & VMMC_CLOSED)) finish(e, slot);
}

static uint32_t window_cap(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  /* Before it is accepted it is its listener's. */
  bool accepted = atomic_load_explicit(&app_slot(e, slot)->generation, memory_order_acquire) == c->generation;
  uint32_t told_by = (c->flags & PASSIVE) && !accepted ? c->listener : slot;
  uint32_t cap = atomic_load_explicit(&app_slot(e, told_by)->receive_window, memory_order_relaxed);
  if (!cap || cap > VMMC_RING) return VMMC_RING;
  return cap < VMMC_PAGE ? VMMC_PAGE : cap;
}

uint64_t connection_read(const struct endpoint *e, uint32_t slot) {
  const struct vmmc_nic_slot *n = nic_slot(e, slot);
  uint64_t consumed = connection_of(e, slot)->consumed;
  uint64_t from = atomic_load_explicit(&n->redirected_from, memory_order_relaxed);
  uint64_t to = atomic_load_explicit(&n->redirected_to, memory_order_relaxed);
  return from <= consumed && consumed < to ? to : consumed;
}

/*
 * Credit.  The window begins with a page, so that ten thousand idle connections promise little.  A sender
 * that has used all of it gets VMMC_LEAST_WINDOW at once, and then twice as much each time, up to
 * UNREAD_WINDOW, although nothing was read.  Beyond that it doubles when the sender was using more than half
 * of it and the reader kept up.  A new limit is worth telling when it opens a quarter of the window: the
 * library rings after a quarter of the least window, so a sender without credit is always told once the
 * reader has read what is there.
 */
enum { UNREAD_WINDOW = 64 * 1024 };

static bool all_used(const struct connection *c) { return c->placed == c->told; }

/* The window that the connection should have now. */
static uint32_t window_now(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  uint32_t cap = window_cap(e, slot), window = c->window > cap ? cap : c->window;
  bool keeps_up = c->told - c->placed < window / 2 && connection_read(e, slot) - c->grown >= window / 4;
  if (keeps_up || (all_used(c) && window < UNREAD_WINDOW))
    window = window < VMMC_LEAST_WINDOW / 2 ? VMMC_LEAST_WINDOW : window * 2;
  return window > cap ? cap : window;
}

/* Makes room for more, where that is worth telling.  False: the limit stays. */
static bool raise_limit(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  uint32_t window = window_now(e, slot);
  uint64_t read = connection_read(e, slot), limit = read + window;
  if (limit < c->told + window / 4) return false;
  if (!connection_commit(e, slot, limit)) {
    /* Memory is short: with what lies behind the reader given back, as much as before. */
    window = window > c->window ? c->window : window;
    limit = read + window;
    give_back_unused(e, slot);
    if (limit <= c->told || !connection_commit(e, slot, limit)) return false;
  }
  if (window > c->window) c->grown = read;
  c->window = window;
  c->told = limit;
  return true;
}

uint64_t connection_credit(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  raise_limit(e, slot);
  c->recalling = 0; /* the peer goes by what it hears last: a RECALL on its way is void */
  return c->told;
}

bool connection_credit_due(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  uint32_t window = window_now(e, slot);
  return connection_read(e, slot) + window >= c->told + window / 4;
}

/* ---- requests ---- */

static int request_connect(struct endpoint *e, uint32_t slot, struct vmmc_address local, struct vmmc_address peer,
                           uint32_t node, uint32_t flags, uint32_t request) {
  struct connection *c = connection_of(e, slot);
  if (c->state != CONNECTION_IDLE) return c->asked == request ? 0 : EISCONN; /* 0: a predecessor began it */
  if (node >= nic.nodes) return EHOSTUNREACH;
  if (!connection_commit(e, slot, VMMC_FIRST_WINDOW)) return ENOBUFS;
  int error = port_ephemeral(e, slot, &local, flags);
  if (error) return error;
  c->local = local;
  c->peer = peer;
  c->far_node = node;
  c->told = c->window;
  c->asked = request;
  bool welcomed = awaited[node] < link_welcomes(node, &peer);
  c->flags = welcomed ? c->flags | WELCOMED : c->flags & ~(uint32_t)WELCOMED; /* a predecessor may have noted it */
  nic_slot(e, slot)->local = local;
  nic_slot(e, slot)->peer = peer;
  nic_slot(e, slot)->peer_node = node;
  in_order();
  c->state = CONNECTION_CONNECTING;
  await(e, slot);
  atomic_store_explicit(&nic_slot(e, slot)->state, welcomed ? VMMC_ESTABLISHED : VMMC_CONNECTING, memory_order_release);
  if (welcomed) {
    set_status(e, slot, VMMC_CONNECTED);
    COUNT(e, connections_welcomed, 1);
  }
  connection_enqueue(e, slot);
  return 0;
}

static int request_listen(struct endpoint *e, uint32_t slot, struct vmmc_address local, uint32_t flags, uint32_t backlog,
                          uint32_t request) {
  struct connection *c = connection_of(e, slot);
  c->backlog = backlog > 4096 ? 4096 : backlog;
  if (c->state == CONNECTION_LISTENING) {
    port_unwelcome(c->local.port); /* of another backlog */
    return 0;
  }
  if (c->state != CONNECTION_IDLE) return EINVAL;
  if (!c->binding || c->asked == request) {
    int error = port_bind(e, slot, &local, flags, request);
    if (error) return error;
    c->local = nic_slot(e, slot)->local = local;
  }
  int error = port_listen(e, slot);
  if (error) return error;
  in_order();
  c->state = CONNECTION_LISTENING;
  atomic_store_explicit(&nic_slot(e, slot)->state, VMMC_LISTENING, memory_order_release);
  return 0;
}

static void serve_request(struct endpoint *e, uint32_t slot, uint32_t request) {
  struct connection *c = connection_of(e, slot);
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  core_opened();
  /* One copy, which is then used: the app may write while we read. */
  volatile struct vmmc_app_slot *a = app_slot(e, slot);
  uint32_t op = a->op, flags = a->bind_flags, node = a->peer_node, backlog = a->backlog;
  struct vmmc_address local = a->local, peer = a->peer;
  int error = EINVAL;
  switch (op) {
    case VMMC_REQUEST_BIND:
      error = c->state == CONNECTION_IDLE ? port_bind(e, slot, &local, flags, request) : EINVAL;
      if (!error) c->local = n->local = local;
      break;
    case VMMC_REQUEST_LISTEN: error = request_listen(e, slot, local, flags, backlog, request); break;
    case VMMC_REQUEST_CONNECT: error = request_connect(e, slot, local, peer, node, flags, request); break;
    default: COUNT(e, commands_rejected, 1);
  }
  c->answer = error;
  in_order();
  c->requested = request;
  in_order();
  n->reply_error = error;
  /* release: the answer's content first */
  atomic_store_explicit(&n->reply, request, memory_order_release);
  wake_slot(e, slot, WAKE_WRITERS);
}

/* ---- listening ---- */

static void reset_far(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  struct link *link = link_to(c->far_node);
  if (!link) return;
  struct packet p = { .type = PACKET_RESET, .to = c->far, .from = end_of(e, slot) };
  link_reply(link, &p);
}

void connection_abandon(struct endpoint *e, uint32_t slot, int error) {
  reset_far(e, slot);
  connection_fail(e, slot, error);
}

/* Entries are taken whole: a position inside one is none that the library stores. */
uint64_t connection_entries_taken(struct connection *c, const struct half *h) {
  bool whole = h->consumed % sizeof(struct vmmc_accept_entry) == 0;
  if (whole && h->consumed >= c->consumed && h->consumed <= c->placed) c->consumed = h->consumed;
  return c->consumed;
}

/* Nodes whose connections found the backlog full may ask again. */
static void tell_waiting(struct connection *listener) {
  for (uint32_t word = 0; word < VMMC_NODES_MAX / 64; word++)
    for (; listener->waiting[word]; listener->waiting[word] &= listener->waiting[word] - 1) {
      struct link *link = link_to(word * 64 + (uint32_t)__builtin_ctzll(listener->waiting[word]));
      if (link) link_reply(link, &(struct packet){ .type = PACKET_RETRY });
    }
}

static void look_listening(struct endpoint *e, uint32_t slot, const struct half *h) {
  struct connection *c = connection_of(e, slot);
  uint64_t taken = connection_entries_taken(c, h);
  if (!(h->shut & VMMC_CLOSED)) {
    if ((c->placed - taken) / sizeof(struct vmmc_accept_entry) > c->backlog) return;
    tell_waiting(c);
    return;
  }
  /* Connections that the program never accepted are reset, as Linux does. */
  for (uint64_t at = taken; at < c->placed; at += sizeof(struct vmmc_accept_entry)) {
    struct vmmc_accept_entry entry;
    memcpy(&entry, default_buffer(e, slot) + at % VMMC_RING, sizeof entry);
    struct connection *queued = connection_of(e, entry.slot);
    if (queued->generation != entry.generation || queued->state == CONNECTION_NONE) continue;
    if (queued->state == CONNECTION_ESTABLISHED) reset_far(e, entry.slot);
    finish(e, entry.slot);
  }
  finish(e, slot); /* the port first: who asks again finds nobody */
  tell_waiting(c);
}

static bool made_before(const struct packet *p, uint32_t node, struct endpoint **e_out, uint32_t *slot_out) {
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    for (uint32_t slot = VMMC_ACTIVE_SLOTS; slot < e->own->passive_end; slot++) {
      struct connection *c = connection_of(e, slot);
      if (c->state == CONNECTION_NONE || c->far_node != node || memcmp(&c->far, &p->from, sizeof c->far)) continue;
      *e_out = e;
      *slot_out = slot;
      return true;
    }
  }
  return false;
}

static void refuse(struct link *link, const struct packet *p, uint8_t type, int error) {
  struct packet answer = { .type = type, .error = (uint16_t)error, .to = p->from };
  link_reply(link, &answer);
}

static void say_accepted(struct link *link, struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  struct packet answer = { .type = PACKET_ACCEPTED, .to = c->far, .from = end_of(e, slot), .limit = c->told };
  link_reply(link, &answer);
}

/* The connection that a CONNECT asks for, in a slot that was taken for it, and its entry in the accept queue. */
static void accept_connect(struct link *link, const struct packet *p, struct endpoint *e, uint32_t listener, uint32_t slot) {
  struct connection *l = connection_of(e, listener);
  struct connection *c = connection_of(e, slot);
  uint32_t generation = c->generation + 1 ? c->generation + 1 : 1;
  prepare(e, slot);
  c->flags = PASSIVE | UNQUEUED; /* until the listener's position says otherwise, it is not there */
  c->listener = listener;
  c->bind_flags = nic.state->binding[l->binding - 1].flags;
  c->entry = l->placed;
  c->far = p->from;
  c->far_node = link_node(link);
  c->far_limit = p->limit;
  c->told = c->window;
  c->local = p->peer;
  c->peer = p->local;
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  n->local = c->local;
  n->peer = c->peer;
  n->peer_node = c->far_node;
  atomic_store_explicit(&n->status, VMMC_CONNECTED, memory_order_relaxed);
  enter(e, slot, generation, CONNECTION_ESTABLISHED);
  port_accepted(c);
  publish(e, slot, VMMC_ESTABLISHED);
  COUNT(e, connections_opened, 1);

  struct vmmc_accept_entry entry = { slot, generation };
  memcpy(default_buffer(e, listener) + l->placed % VMMC_RING, &entry, sizeof entry);
  in_order();
  l->placed += sizeof entry;
  in_order();
  c->flags &= ~(uint32_t)UNQUEUED;
  /* release: the entry and the slot before the position */
  atomic_store_explicit(&nic_slot(e, listener)->placed, l->placed, memory_order_release);
  wake_slot(e, listener, WAKE_READERS);
  say_accepted(link, e, slot);
}

static void answer_connect(struct link *link, const struct packet *p) {
  struct endpoint *e;
  uint32_t slot;
  if ((p->flags & PACKET_AGAIN) && made_before(p, link_node(link), &e, &slot)) {
    say_accepted(link, e, slot);
    return;
  }
  struct binding *b = port_listener(&p->peer);
  e = b ? endpoint_find(b->endpoint, b->serial) : NULL;
  if (!e || e->dying) {
    COUNT_NODE(connections_refused, 1);
    refuse(link, p, PACKET_REFUSED, ECONNREFUSED);
    return;
  }
  uint32_t listener = b->slot;
  struct connection *l = connection_of(e, listener);
  struct half h = connection_half(e, listener);
  uint64_t waiting = l->placed - connection_entries_taken(l, &h);
  if (waiting / sizeof(struct vmmc_accept_entry) > l->backlog ||
      waiting + sizeof(struct vmmc_accept_entry) > VMMC_RING) {
    port_welcome(&p->peer, 0);
    l->waiting[link_node(link) / 64] |= 1ull << link_node(link) % 64;
    refuse(link, p, PACKET_BUSY, 0);
    return;
  }
  slot = connection_commit(e, listener, l->placed + sizeof(struct vmmc_accept_entry)) ? take_passive(e) : VMMC_SLOTS;
  if (slot == VMMC_SLOTS) {
    log_event("warning", "endpoint %u (pid %d): no slot or memory for a connection to port %u", e->index, e->pid, p->peer.port);
    port_welcome(&p->peer, 0);
    COUNT_NODE(connections_refused, 1);
    refuse(link, p, PACKET_REFUSED, ECONNREFUSED);
    return;
  }
  accept_connect(link, p, e, listener, slot);
  port_welcome(&p->peer, l->backlog - waiting / sizeof(struct vmmc_accept_entry));
}

/* ---- what the app is told of its peer ---- */

/* Bytes that the program may have in its ring beyond those acknowledged. */
static uint64_t send_window(struct endpoint *e, uint32_t slot) {
  uint32_t window = atomic_load_explicit(&app_slot(e, slot)->send_window, memory_order_relaxed);
  return window && window < VMMC_RING ? window : VMMC_RING;
}

static uint64_t wanted(struct endpoint *e, uint32_t slot) {
  return atomic_load_explicit(&app_slot(e, slot)->wanted, memory_order_relaxed);
}

/* In steps: most answers carry a few bytes' worth, and nobody waits for so little, unless the app says so.  What the
 * peer was asked for is such a step, too: a writer that finds no room lacks at most what no question was about; and
 * so is what lets the ring begin anew. */
static void tell_acknowledged(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  uint64_t acknowledged = c->acknowledged, asked = c->asked_placed;
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  uint64_t told = atomic_load_explicit(&n->acknowledged, memory_order_relaxed);
  bool answers = told < asked && asked <= acknowledged;
  /* relaxed: only compared; what is in the ring and not transmitted keeps it from beginning anew */
  bool empty = acknowledged - told >= VMMC_REWIND &&
               atomic_load_explicit(&app_slot(e, slot)->written, memory_order_relaxed) == acknowledged;
  if (acknowledged < told + send_window(e, slot) / 4 && !answers && !empty &&
      (acknowledged == told || wanted(e, slot) <= told))
    return;
  /* release pairs with the writer's acquire: the peer has what will be overwritten */
  atomic_store_explicit(&n->acknowledged, acknowledged, memory_order_release);
  wake_slot(e, slot, WAKE_WRITERS);
}

/* ---- the app rang ---- */

/* True when the half's positions can be: hostile ones end the connection. */
static bool half_is_sane(struct endpoint *e, uint32_t slot, const struct half *h) {
  struct connection *c = connection_of(e, slot);
  if (h->written >= c->transmitted && h->written <= c->acknowledged + VMMC_RING && h->consumed >= c->consumed && h->consumed <= c->placed)
    return true;
  endpoint_nonsense(e, "impossible stream positions in slot %u; its connection is reset", slot);
  reset_far(e, slot);
  connection_fail(e, slot, EPROTO);
  return false;
}

/* Whether the peer is to be asked how far it has come, although nothing more is to be sent: the app wants to know. */
static bool asks_placed(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  return c->transmitted > c->asked_placed && wanted(e, slot) > c->asked_placed;
}

/* The app has closed it, and not to have it end in peace. */
static bool is_reset_by_app(struct endpoint *e, uint32_t slot, const struct half *h) {
  uint64_t placed = connection_of(e, slot)->placed;
  bool unread = placed > connection_read(e, slot) && placed != h->consumed && !(h->shut & VMMC_FORKED);
  return (h->shut & VMMC_CLOSED) && ((h->shut & VMMC_ABORT) || unread);
}

bool connection_holds_port(struct endpoint *e, uint32_t slot) {
  const struct connection *c = connection_of(e, slot);
  struct half h = connection_half(e, slot); /* the doorbell may not have been looked at yet */
  if (c->state == CONNECTION_CLOSING) return !(c->flags & SAID_RESET);
  return c->state == CONNECTION_ESTABLISHED && !is_reset_by_app(e, slot, &h);
}

static bool is_sendable(const struct connection *c, const struct half *h) {
  return h->written > c->transmitted && c->transmitted < c->far_limit;
}

/* What an established connection's peer is to hear next: a packet's type, or PACKET_NONE. */
static uint8_t next_to_say(struct endpoint *e, uint32_t slot, const struct half *h) {
  struct connection *c = connection_of(e, slot);
  bool closed = h->shut & VMMC_CLOSED;
  if (c->flags & HEARD_CLOSE) return PACKET_NONE;
  bool unsent = h->written > c->transmitted;
  /* What was written before a reset goes first, as far as the peer takes it and as it does over a loopback: an answer
   * to a request that was refused unread, say. */
  if (is_sendable(c, h)) return c->flags & TELL_AGAIN ? PACKET_CREDIT : PACKET_DATA;
  if (is_reset_by_app(e, slot, h)) return PACKET_RESET;
  if (c->flags & TELL_AGAIN) return PACKET_CREDIT;
  if (!unsent && closed) return PACKET_CLOSE;
  if (!unsent && (h->shut & VMMC_SHUT_WRITE) && !(c->flags & SAID_FIN)) return PACKET_FIN;
  if ((c->flags & TELL_PLACED) || asks_placed(e, slot) || connection_credit_due(e, slot)) return PACKET_CREDIT;
  return c->flags & SAY_IDLE ? PACKET_RECALL : PACKET_NONE;
}

bool connection_wants_to_say(struct endpoint *e, uint32_t slot, const struct half *h) {
  return next_to_say(e, slot, h) != PACKET_NONE;
}

static void look_established(struct endpoint *e, uint32_t slot, const struct half *h) {
  struct connection *c = connection_of(e, slot);
  if (!half_is_sane(e, slot, h)) return;
  c->consumed = h->consumed;
  tell_acknowledged(e, slot);
  /* Where the peer has closed a write is an error, and our own close the end. */
  if (is_sendable(c, h) || (c->flags & HEARD_CLOSE) || next_to_say(e, slot, h)) connection_enqueue(e, slot);
}

/* What is left to do when the app has closed a slot that no peer need hear of. */
void connection_end(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  struct half h = connection_half(e, slot);
  if (!(h.shut & VMMC_CLOSED)) return;
  if (c->state == CONNECTION_LISTENING)
    look_listening(e, slot, &h);
  else if (c->state == CONNECTION_IDLE || c->state == CONNECTION_DEAD)
    finish(e, slot);
  else if (c->state == CONNECTION_BUSY && (!(c->flags & WELCOMED) || (h.shut & VMMC_ABORT)))
    finish(e, slot); /* the peer has nothing of it; who was welcomed, and not to be reset, may have written */
}

void connection_abort(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  if (c->state == CONNECTION_ESTABLISHED) reset_far(e, slot);
  bool listened = c->state == CONNECTION_LISTENING;
  connection_fail(e, slot, ECONNRESET);
  if (listened) tell_waiting(c);
}

/* There is no memory to remember an active slot in: whoever asks for something with it is told, and may ask again.
 * The page of the NIC's half, in which it is told, is the library's to commit. */
static void cannot_remember(struct endpoint *e, uint32_t slot, uint32_t generation) {
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  if (!segment_commit(e->nic_fd, VMMC_NIC_SLOTS + (uint64_t)slot * sizeof *n, sizeof *n)) return;
  uint32_t request = atomic_load_explicit(&app_slot(e, slot)->request, memory_order_acquire);
  n->reply_error = ENOBUFS;
  atomic_store_explicit(&n->state, VMMC_FREE, memory_order_relaxed);
  atomic_store_explicit(&n->generation, generation, memory_order_relaxed);
  /* release: the answer's content first */
  atomic_store_explicit(&n->reply, request, memory_order_release);
  wake_slot(e, slot, WAKE_WRITERS);
}

int connection_look(struct endpoint *e, uint32_t slot) {
  enum { LOOK = 1, REQUEST = 16 };
  int work = LOOK;
  if (slot >= VMMC_SLOTS) return work;
  struct connection *c = connection_of(e, slot);
  struct vmmc_app_slot *a = app_slot(e, slot);
  uint32_t generation = atomic_load_explicit(&a->generation, memory_order_acquire);
  if (!is_passive(slot) && generation && !e->dying && slot < VMMC_ACTIVE_SLOTS) {
    if (slot >= e->own->active_end && !commit_slot(e, slot)) {
      cannot_remember(e, slot, generation);
      return work;
    }
    if (c->state == CONNECTION_NONE && generation != c->generation) {
      reset_ring(e, slot);
      prepare(e, slot);
      enter(e, slot, generation, CONNECTION_IDLE);
      publish(e, slot, VMMC_IDLE);
    }
  }
  if (slot >= (is_passive(slot) ? e->own->passive_end : e->own->active_end)) return work;
  if (c->state == CONNECTION_NONE) return work;
  if (generation == c->generation && !e->dying) {
    uint32_t request = atomic_load_explicit(&a->request, memory_order_acquire);
    if (request != c->requested) {
      serve_request(e, slot, request);
      work = REQUEST;
    }
  } else if (!e->dying) {
    return work;
  }
  if (generation == c->generation && !e->dying) keepalive_watch(e, slot);
  struct half h = connection_half(e, slot);
  switch (c->state) {
    case CONNECTION_LISTENING: look_listening(e, slot, &h); break;
    case CONNECTION_ESTABLISHED: look_established(e, slot, &h); break;
    case CONNECTION_CONNECTING:
      /* Who was welcomed may have written as well: what is there to say is said when the peer has answered. */
      if (!(h.shut & VMMC_CLOSED) || (c->flags & WELCOMED)) break;
      if (c->flags & SAID_CONNECT)
        c->flags |= APP_CLOSED; /* the answer will find nobody */
      else
        finish(e, slot);
      break;
    case CONNECTION_IDLE:
    case CONNECTION_BUSY:
    case CONNECTION_DEAD: connection_end(e, slot); break;
    default: break; /* CLOSING waits for the peer */
  }
  return work;
}

/* ---- telling the peer what it has not been told ---- */

static struct packet *say(struct link *link, struct endpoint *e, uint32_t slot, uint8_t type) {
  struct packet *p = link_next(link);
  struct connection *c = connection_of(e, slot);
  p->type = type;
  p->to = c->far;
  p->from = end_of(e, slot);
  p->position = c->transmitted;
  p->limit = c->told;
  p->placed = c->placed;
  return p;
}

/* True: there may be more to say. */
static bool transmit_established(struct endpoint *e, uint32_t slot, struct link *link) {
  struct connection *c = connection_of(e, slot);
  struct half h = connection_half(e, slot);
  if (!half_is_sane(e, slot, &h)) return false;
  c->consumed = h.consumed;
  if (c->flags & HEARD_CLOSE) {
    if (h.shut & VMMC_CLOSED)
      finish(e, slot);
    else if (h.written > c->transmitted)
      connection_fail(e, slot, EPIPE); /* a write to a peer that has closed */
    return false;
  }
  /* Pushed first, noted then: killed in between, the successor says it again. */
  uint8_t type = next_to_say(e, slot, &h);
  switch (type) {
    case PACKET_RESET:
      say(link, e, slot, PACKET_RESET)->flags = PACKET_WANT_CLOSED;
      link_push(link);
      in_order();
      c->flags |= SAID_RESET;
      c->state = CONNECTION_CLOSING;
      return false;
    case PACKET_CLOSE:
      say(link, e, slot, PACKET_CLOSE);
      link_push(link);
      in_order();
      c->state = CONNECTION_CLOSING;
      return false;
    case PACKET_DATA:
      stream_transmit(e, slot, link, h.written);
      /* Mostly that was all, credit included: what the app says from now on it rings for. */
      if (c->transmitted == h.written && !h.shut && !(c->flags & (TELL_AGAIN | TELL_PLACED | SAY_IDLE)) &&
          !asks_placed(e, slot))
        return false;
      break;
    case PACKET_FIN: {
      /* With the credit of the moment, as every packet of an open stream: this may be the last one. */
      uint64_t limit = connection_credit(e, slot);
      say(link, e, slot, PACKET_FIN)->limit = limit;
      link_push(link);
      in_order();
      c->flags |= SAID_FIN;
      break;
    }
    case PACKET_CREDIT: {
      bool asks = asks_placed(e, slot);
      if (!raise_limit(e, slot) && !(c->flags & (TELL_AGAIN | TELL_PLACED)) && !asks) return false;
      connection_credit(e, slot);
      say(link, e, slot, PACKET_CREDIT)->flags =
          (c->flags & TELL_AGAIN ? PACKET_AGAIN : 0) | (asks ? PACKET_WANT_PLACED : 0);
      link_push(link);
      in_order();
      c->flags &= ~(uint32_t)(TELL_AGAIN | TELL_PLACED);
      if (asks) c->asked_placed = c->transmitted;
      break;
    }
    case PACKET_RECALL: {
      c->recall++;
      c->recalling = 1;
      in_order();
      struct packet *p = say(link, e, slot, PACKET_RECALL);
      p->limit = c->consumed + VMMC_FIRST_WINDOW;
      p->recall = c->recall;
      link_push(link);
      in_order();
      c->flags &= ~(uint32_t)SAY_IDLE;
      break;
    }
    default: return false;
  }
  h = connection_half(e, slot);
  return next_to_say(e, slot, &h) != PACKET_NONE;
}

bool connection_transmit(struct work *work, struct link *link) {
  struct slot_work *w = (struct slot_work *)work;
  struct endpoint *e = w->endpoint;
  uint32_t slot = w->slot;
  struct connection *c = connection_of(e, slot);
  if (c->far_node != link_node(link)) { /* the slot has moved on since it was queued: to another link's queue */
    if (c->state == CONNECTION_CONNECTING || c->state == CONNECTION_ESTABLISHED) connection_enqueue(e, slot);
    return false;
  }
  if (c->state == CONNECTION_CONNECTING && !(c->flags & SAID_CONNECT)) {
    struct packet *p = say(link, e, slot, PACKET_CONNECT);
    p->local = c->local;
    p->peer = c->peer;
    if (c->flags & CONNECT_AGAIN) p->flags = PACKET_AGAIN;
    link_push(link);
    in_order();
    c->flags |= SAID_CONNECT;
  } else if (c->state == CONNECTION_ESTABLISHED) {
    return transmit_established(e, slot, link);
  }
  return false;
}

/* ---- the peer's packets ---- */

static void closed(struct link *link, const struct packet *p) {
  struct packet answer = { .type = PACKET_CLOSED, .to = p->from, .from = p->to };
  link_reply(link, &answer);
}

/* A packet for a connection that is not (or no longer) there. */
static void unknown(struct link *link, const struct packet *p) {
  switch (p->type) {
    case PACKET_CLOSE: closed(link, p); break;
    case PACKET_RESET:
      if (p->flags & PACKET_WANT_CLOSED) closed(link, p);
      break;
    case PACKET_CREDIT:
      if (!(p->flags & PACKET_AGAIN)) {
        COUNT_NODE(packets_dropped, 1);
        break;
      } /* asks whether we are there */
      __attribute__((fallthrough));
    case PACKET_DATA:
    case PACKET_ACCEPTED: {
      struct packet answer = { .type = PACKET_RESET, .to = p->from, .from = p->to };
      link_reply(link, &answer);
      break;
    }
    default: COUNT_NODE(packets_dropped, 1);
  }
}

/* Whether the peer is to be asked for its position with a packet of bytes up to `end`: once for each quarter of
 * the window, so that a writer who waits for room hears of it. */
bool connection_wants_placed(struct endpoint *e, uint32_t slot, uint64_t end) {
  uint64_t asked = connection_of(e, slot)->asked_placed;
  return end - asked >= send_window(e, slot) / 4 || wanted(e, slot) > asked;
}

static void take_placed(struct endpoint *e, uint32_t slot, uint64_t placed) {
  struct connection *c = connection_of(e, slot);
  if (placed <= c->acknowledged || placed > c->transmitted) return;
  c->acknowledged = placed;
  tell_acknowledged(e, slot);
  if (e->gone) give_back_later(e, slot);
}

static void take_limit(struct endpoint *e, uint32_t slot, uint64_t limit) {
  struct connection *c = connection_of(e, slot);
  if (limit <= c->far_limit) return;
  bool waited = c->transmitted == c->far_limit;
  c->far_limit = limit;
  if (waited) connection_enqueue(e, slot);
}

/* The peer is idle.  Credit that we do not use goes back: what was transmitted needs it, what waits can ask. */
static void answer_recall(struct link *link, struct endpoint *e, uint32_t slot, const struct packet *p) {
  struct connection *c = connection_of(e, slot);
  uint64_t limit = p->limit > c->transmitted ? p->limit : c->transmitted;
  if (limit < c->far_limit) c->far_limit = limit;
  struct packet answer = { .type = PACKET_RECALLED, .to = c->far, .from = end_of(e, slot), .limit = c->far_limit };
  answer.placed = c->placed;
  answer.recall = p->recall;
  link_reply(link, &answer);
}

static void recalled(struct endpoint *e, uint32_t slot, const struct packet *p) {
  struct connection *c = connection_of(e, slot);
  if (!c->recalling || p->recall != c->recall || p->limit > c->told) return;
  c->recalling = 0;
  in_order();
  c->told = p->limit;
  c->window = VMMC_FIRST_WINDOW;
  if (all_used(c)) connection_enqueue(e, slot); /* the last bytes of it came just before */
}

static void established(struct endpoint *e, uint32_t slot, const struct packet *p) {
  struct connection *c = connection_of(e, slot);
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  c->far = p->from;
  c->far_limit = p->limit;
  in_order();
  await_no_more(e, slot);
  c->state = CONNECTION_ESTABLISHED;
  COUNT(e, connections_opened, 1);
  if (!(c->flags & WELCOMED)) { /* else it is known */
    atomic_store_explicit(&n->state, VMMC_ESTABLISHED, memory_order_relaxed);
    set_status(e, slot, VMMC_CONNECTED);
    wake_slot(e, slot, WAKE_BOTH);
  }
  connection_enqueue(e, slot);
}

/* The app has shut down both ways: nobody will read what comes, and TCP answers it by a reset, whatever of what was
 * written the peer has yet to take. */
static bool is_deaf(struct endpoint *e, uint32_t slot) {
  uint32_t both = VMMC_SHUT_READ | VMMC_SHUT_WRITE;
  return (connection_half(e, slot).shut & both) == both;
}

/* The answer to our CONNECT. */
static void connect_answered(struct link *link, struct endpoint *e, uint32_t slot, const struct packet *p) {
  struct connection *c = connection_of(e, slot);
  bool connecting = is_connecting(c);
  if (p->type == PACKET_ACCEPTED) {
    if (connecting)
      established(e, slot, p);
    else if (c->state != CONNECTION_ESTABLISHED && c->state != CONNECTION_CLOSING)
      unknown(link, p);
  } else if (!connecting) {
    return;
  } else if (p->type == PACKET_REFUSED) {
    connection_fail(e, slot, c->flags & WELCOMED ? ECONNRESET : p->error);
  } else if (c->flags & APP_CLOSED) { /* BUSY */
    finish(e, slot);
  } else {
    c->state = CONNECTION_BUSY;
    connection_end(e, slot); /* the app may have closed it */
    if (c->state == CONNECTION_BUSY) link_wait_busy(link, e, slot);
  }
}

/* Of a stream that is open here: bytes, positions, credit, its end. */
static void stream_heard(struct link *link, struct endpoint *e, uint32_t slot, const struct packet *p) {
  struct connection *c = connection_of(e, slot);
  if (p->type == PACKET_DATA && is_deaf(e, slot)) {
    unknown(link, p);
    connection_fail(e, slot, ECONNRESET);
    return;
  }
  take_placed(e, slot, p->placed);
  if (p->flags & PACKET_WANT_PLACED) { /* also for bytes that came before: their NIC may have died since */
    c->flags |= TELL_PLACED;
    connection_enqueue(e, slot);
  }
  if (p->type == PACKET_RECALL) {
    answer_recall(link, e, slot, p);
    return;
  }
  if (p->type == PACKET_RECALLED) {
    recalled(e, slot, p);
    return;
  }
  take_limit(e, slot, p->limit);
  if (p->type == PACKET_DATA) {
    stream_place(e, slot, p);
    /* Nobody reads it: a reset, also while the peer does not take what was written before. */
    if (connection_half(e, slot).shut & VMMC_CLOSED) connection_enqueue(e, slot);
  }
  if (p->type != PACKET_FIN || (c->flags & HEARD_FIN)) return;
  c->flags |= HEARD_FIN;
  set_status(e, slot, VMMC_END_OF_FILE);
  wake_slot(e, slot, WAKE_READERS);
}

/* The peer is done with the connection, or with ours. */
static void end_heard(struct link *link, struct endpoint *e, uint32_t slot, const struct packet *p) {
  struct connection *c = connection_of(e, slot);
  bool connecting = is_connecting(c);
  bool live = c->state == CONNECTION_ESTABLISHED;
  switch (p->type) {
    case PACKET_CLOSE:
      closed(link, p);
      if (!live) break;
      take_placed(e, slot, p->placed);
      c->flags |= HEARD_FIN | HEARD_CLOSE;
      set_status(e, slot, VMMC_END_OF_FILE | VMMC_PEER_CLOSED);
      wake_slot(e, slot, WAKE_BOTH);
      connection_enqueue(e, slot);
      break;
    case PACKET_RESET:
      if (p->flags & PACKET_WANT_CLOSED) closed(link, p);
      if (connecting || live) connection_fail(e, slot, (c->flags & HEARD_FIN) ? EPIPE : ECONNRESET);
      break;
    case PACKET_CLOSED:
      if (c->state == CONNECTION_CLOSING) finish(e, slot);
      break;
    default: break;
  }
}

void connection_packet(struct link *link, const struct packet *p) {
  if (p->type == PACKET_CONNECT) {
    answer_connect(link, p);
    return;
  }
  struct endpoint *e = endpoint_find(p->to.endpoint, p->to.serial);
  uint32_t slot = p->to.slot;
  if (!e || slot >= (is_passive(slot) ? e->own->passive_end : e->own->active_end)) {
    unknown(link, p);
    return;
  }
  struct connection *c = connection_of(e, slot);
  if (c->generation != p->to.generation || c->state == CONNECTION_NONE || c->far_node != link_node(link)) {
    unknown(link, p);
    return;
  }
  switch (p->type) {
    case PACKET_ACCEPTED: case PACKET_REFUSED: case PACKET_BUSY:
      connect_answered(link, e, slot, p);
      break;
    case PACKET_DATA: case PACKET_CREDIT: case PACKET_RECALL: case PACKET_RECALLED: case PACKET_FIN:
      if (c->state == CONNECTION_ESTABLISHED)
        stream_heard(link, e, slot, p);
      else if (p->type == PACKET_DATA ? !(c->flags & SAID_RESET) : p->type == PACKET_CREDIT && c->state == CONNECTION_DEAD)
        unknown(link, p);
      break;
    default: end_heard(link, e, slot, p);
  }
}

/* ---- after a death ---- */

void connection_retell(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  switch (c->state) {
    case CONNECTION_CONNECTING:
      /* Also when it is not noted as said: it may have been, just before a death. */
      c->flags = (c->flags & ~(uint32_t)SAID_CONNECT) | CONNECT_AGAIN;
      break;
    case CONNECTION_BUSY: /* RETRY may have been lost, and CONNECT may be answered anew */
      c->flags = (c->flags & ~(uint32_t)SAID_CONNECT) | CONNECT_AGAIN;
      in_order();
      c->state = CONNECTION_CONNECTING;
      break;
    case CONNECTION_ESTABLISHED:
      c->flags &= ~(uint32_t)SAID_FIN;
      c->recalling = 0; /* the limit is told again, and holds */
      /* A limit that was noted and not told, a reset that was not heard.  Whose peer has closed needs
       * neither, and its peer may be gone already. */
      if (!(c->flags & HEARD_CLOSE)) c->flags |= TELL_AGAIN;
      break;
    case CONNECTION_CLOSING: /* CLOSE or RESET again, and CLOSED again */
      c->flags &= ~(uint32_t)SAID_RESET;
      in_order();
      c->state = CONNECTION_ESTABLISHED;
      break;
    default: return;
  }
  connection_enqueue(e, slot);
}

/* What there is with a node, one of the two having been given up as unreachable.  asking: connections that
 * are not made yet are asked for again instead of failing. */
void connections_given_up(struct endpoint *e, uint32_t node, int error, bool asking) {
  for (int pass = 0; pass < 2; pass++) {
    uint32_t end = pass ? e->own->passive_end : e->own->active_end;
    for (uint32_t slot = pass ? VMMC_ACTIVE_SLOTS : 0; slot < end; slot++) {
      struct connection *c = connection_of(e, slot);
      bool asks = is_connecting(c);
      bool made = c->state == CONNECTION_ESTABLISHED || c->state == CONNECTION_CLOSING;
      if (c->far_node != node || !(asks || made)) continue;
      if (asks && asking)
        connection_retell(e, slot);
      else
        connection_fail(e, slot, error);
    }
  }
}

void connection_unmake(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  if (c->state == CONNECTION_NONE || !(c->flags & UNQUEUED)) return;
  struct connection *l = connection_of(e, c->listener);
  if (l->state != CONNECTION_LISTENING || l->placed <= c->entry)
    c->state = CONNECTION_NONE; /* its CONNECT is still there to be answered */
  else
    c->flags &= ~(uint32_t)UNQUEUED;
}

/* What the app is shown of the slot, derived from what the NIC knows: its predecessor may have been killed
 * between the one and the other. */
static void show(struct endpoint *e, uint32_t slot) {
  static const uint32_t shown[] = {
    [CONNECTION_NONE] = VMMC_FREE, [CONNECTION_IDLE] = VMMC_IDLE, [CONNECTION_LISTENING] = VMMC_LISTENING,
    [CONNECTION_CONNECTING] = VMMC_CONNECTING, [CONNECTION_BUSY] = VMMC_CONNECTING,
    [CONNECTION_ESTABLISHED] = VMMC_ESTABLISHED, [CONNECTION_CLOSING] = VMMC_ESTABLISHED, [CONNECTION_DEAD] = VMMC_DEAD,
  };
  struct connection *c = connection_of(e, slot);
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  uint32_t bits = 0;
  bool welcomed = is_connecting(c) && (c->flags & WELCOMED);
  if (welcomed || c->state == CONNECTION_ESTABLISHED || c->state == CONNECTION_CLOSING) bits |= VMMC_CONNECTED;
  if (c->flags & HEARD_FIN) bits |= VMMC_END_OF_FILE;
  if (c->flags & HEARD_CLOSE) bits |= VMMC_PEER_CLOSED;
  /* Of data the app's view is stored first, of accept entries the NIC's own. */
  if (c->state == CONNECTION_LISTENING)
    atomic_store_explicit(&n->placed, c->placed, memory_order_release);
  else
    c->placed = atomic_load_explicit(&n->placed, memory_order_relaxed);
  struct redirection r = redirection_of_slot(e, slot);
  redirect_recover(&r, c->placed);
  n->local = c->local;
  n->peer = c->peer;
  n->peer_node = c->far_node;
  if (c->state == CONNECTION_ESTABLISHED) {
    atomic_store_explicit(&n->acknowledged, c->acknowledged, memory_order_release);
    c->recalling = 0;
    c->flags &= ~(uint32_t)SAY_IDLE;
  }
  atomic_store_explicit(&n->transmitted, c->transmitted, memory_order_relaxed);
  set_status(e, slot, bits);
  publish(e, slot, welcomed ? VMMC_ESTABLISHED : shown[c->state]);
  if (atomic_load_explicit(&n->reply, memory_order_relaxed) == c->requested) return;
  n->reply_error = c->answer;
  atomic_store_explicit(&n->reply, c->requested, memory_order_release);
}

void connection_recover(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  struct slot_work *work = &e->work[slot];
  work->endpoint = e;
  work->slot = slot;
  work->work.transmit = connection_transmit;
  work->work.lane = e->index;
  give_back_recover(e, slot);
  if (c->state == CONNECTION_NONE) {
    if (atomic_load_explicit(&n->generation, memory_order_relaxed) == c->generation)
      atomic_store_explicit(&n->state, VMMC_FREE, memory_order_release);
  } else {
    await(e, slot);
    show(e, slot);
    if (c->state == CONNECTION_DEAD && link_to(c->far_node)) withdraw(e, slot);
    struct link *link = c->state == CONNECTION_ESTABLISHED ? link_to(c->far_node) : NULL;
    /* Its answer may have waited for room on the link, in memory that is gone: it goes before anything else
     * that the peer hears of this connection. */
    if (link && (c->flags & PASSIVE) && !(c->flags & HEARD_CLOSE)) say_accepted(link, e, slot);
    if (c->state != CONNECTION_IDLE && c->state != CONNECTION_LISTENING) connection_retell(e, slot);
  }
  connection_look(e, slot); /* also a free slot: the app may have taken it */
  wake_slot(e, slot, WAKE_BOTH);
}
