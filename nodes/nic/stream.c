/*
 * stream.c: a connection's bytes.  The sender's NIC names them (position, length); the receiver's NIC
 * copies them, once, from the sender's transmit ring to where they are to go.
 */
#include "nic.h"

enum { PIECE = 64 * 1024 }; /* bytes of a packet: also a connection's share before others have a turn */

void stream_transmit(struct endpoint *e, uint32_t slot, struct link *link, uint64_t written) {
  struct connection *c = connection_of(e, slot);
  uint64_t length = (written < c->far_limit ? written : c->far_limit) - c->transmitted;
  if (length > PIECE) length = PIECE;
  bool ask = connection_wants_placed(e, slot, c->transmitted + length);
  struct packet *p = link_next(link);
  p->type = PACKET_DATA;
  p->to = c->far;
  p->from = (struct packet_end){ e->index, e->serial, slot, c->generation };
  p->position = c->transmitted;
  p->length = (uint32_t)length;
  p->limit = connection_credit(e, slot);
  p->placed = c->placed;
  /* relaxed: loaded after `written`, which said that there is something to transmit */
  uint64_t base = atomic_load_explicit(&app_slot(e, slot)->ring_base, memory_order_relaxed);
  p->offset = (uint32_t)vmmc_ring_offset(c->transmitted, base);
  if (ask) p->flags = PACKET_WANT_PLACED;
  link_push(link);
  core_asked();
  /* After the packet is published: killed in between, the successor sends it again, and the receiver
   * knows the position. */
  in_order();
  c->transmitted += length;
  if (ask) c->asked_placed = c->transmitted;
  atomic_store_explicit(&nic_slot(e, slot)->transmitted, c->transmitted, memory_order_relaxed);
  COUNT(e, bytes_sent, length);
  COUNT(e, sends, 1);
  give_back_later(e, slot);
}

/* Copies stream bytes [at, at + length) to `to`, or to the default buffer: from the sender's ring, or from
 * what was carried of the packet. */
static int copy_run(struct endpoint *e, uint32_t slot, const char *ring, const char *carried, const struct packet *p,
                    uint64_t at, uint64_t length, struct place to) {
  if (e->gone) return 0; /* nobody reads it */
  uint64_t base = atomic_load_explicit(&nic_slot(e, slot)->ring_base, memory_order_relaxed); /* our own */
  while (length) {
    uint64_t from_offset = (p->offset + (at - p->position)) % VMMC_RING, offset = vmmc_ring_offset(at, base);
    uint64_t run = VMMC_RING - (from_offset > offset ? from_offset : offset);
    if (run > length) run = length;
    const char *from = carried ? carried + (at - p->position) : ring + from_offset;
    char *here = to.at ? to.at : default_buffer(e, slot) + offset;
    int error = to.program ? dma_copy_to_program(e->memory, here, from, run) : dma_copy(here, from, run);
    if (error) return error;
    if (to.at) to.at += run;
    at += run;
    length -= run;
  }
  return 0;
}

/*
 * A receive whose address is posted waits for more, and has nothing to do before that has come: not even to
 * give the sender room.  The claim is held, so its words are still those of this receive.
 */
static bool receiver_sleeps_on(struct endpoint *e, uint32_t slot, const struct redirection *r) {
  struct connection *c = connection_of(e, slot);
  struct half h = connection_half(e, slot);
  if (h.consumed > c->consumed && h.consumed <= c->placed) c->consumed = h.consumed;
  uint64_t wake = *(const volatile uint64_t *)&app_slot(e, slot)->redirect_wake;
  return r->claimed && c->placed < wake && connection_read(e, slot) == c->placed;
}

/* How many of the packet's bytes would go to a posted address now. */
uint64_t stream_redirected(const struct packet *p) {
  struct endpoint *e = endpoint_find(p->to.endpoint, p->to.serial);
  uint32_t slot = p->to.slot;
  if (!e || slot >= VMMC_SLOTS || slot >= (slot < VMMC_ACTIVE_SLOTS ? e->own->active_end : e->own->passive_end)) return 0;
  struct redirection r = redirection_of_slot(e, slot);
  return redirect_covers(&r, p->position, p->length);
}

void stream_place(struct endpoint *e, uint32_t slot, const struct packet *p) {
  struct connection *c = connection_of(e, slot);
  struct slot_work *work = &e->work[slot];
  uint64_t at = p->position, end = p->position + p->length;
  if (at > c->placed || end <= c->placed || end > c->told) { /* a gap, a duplicate, or without credit */
    COUNT_NODE(packets_dropped, 1);
    return;
  }
  at = c->placed;
  if (!work->remote) work->remote = remote_find(c->far_node, c->far.serial);
  if (!work->remote) {
    connection_abandon(e, slot, ECONNRESET);
    return;
  }
  connection_rewind(e, slot, VMMC_REWIND);
  const char *ring = work->remote->app + VMMC_APP_RINGS + (uint64_t)c->far.slot * VMMC_RING;
  struct redirection r = redirection_of_slot(e, slot);
  uint64_t redirected = 0;
  int error = 0;
  while (at < end && !error) {
    struct place to;
    uint64_t run = redirect_run(&r, at, end - at, &to);
    error = copy_run(e, slot, ring, link_carried(), p, at, run, to);
    if (error && to.program) { /* not writable, or gone: as if it had not been posted */
      to = (struct place){ 0 };
      error = copy_run(e, slot, ring, link_carried(), p, at, run, to);
    }
    if (error) break;
    at += run;
    if (to.at) {
      redirect_copied(&r, at);
      redirected += run;
    }
  }
  if (link_withdrawn()) at = c->placed; /* what lies there by now may be another connection's */
  uint64_t moved = at - c->placed;
  /* The bytes before the position (release), the position before the claim is given up. */
  atomic_store_explicit(&nic_slot(e, slot)->placed, at, memory_order_release);
  in_order();
  c->placed = at;
  bool asleep = redirected && receiver_sleeps_on(e, slot, &r);
  redirect_done(&r);
  COUNT(e, bytes_received, moved);
  COUNT(e, bytes_redirected, redirected);
  COUNT(e, bytes_default, moved - redirected);
  if (error) {
    log_event("warning", "endpoint %u (pid %d): a peer's memory cannot be read; its connection is reset", e->index, e->pid);
    connection_abandon(e, slot, ECONNRESET);
    return;
  }
  /* Without a look at the slot the app's newest position is not known here; a sender that has used its credit up
   * may want more, whatever was read. */
  if ((redirected && connection_credit_due(e, slot)) || c->placed == c->told) connection_enqueue(e, slot);
  if (!asleep) wake_slot(e, slot, WAKE_READERS);
}
