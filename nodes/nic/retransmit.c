/*
 * retransmit.c: how packets get across a wire that loses, doubles, delays and reorders them.
 *
 * Packet n stays in its place of the sender's queue until it is acknowledged, and the bytes that it refers to
 * stay where the program put them until somebody has copied them.  So a retransmission is an entry of 64 bytes
 * ("packet n, attempt k"), and the receiver, which handles packets in order, keeps of those that come early
 * no more than a bit each.  What a killed NIC's successor needs is `taken` at the receiver and `acknowledged`
 * at the sender, both too low by at most what was under way; all else here is opinion and starts anew.
 *
 * Acknowledgements travel over the wire the other way, and are lost there like anything else.  Each says how
 * far packets were handled, which later ones are there, and which transmission came last: from that the sender
 * measures the round trip (RFC 6298; the attempt is named, so a packet that was sent twice can be measured as
 * well), and knows that what it transmitted well before, and has not heard of, is lost (as in RFC 8985).
 */
#include <stdlib.h>
#include <string.h>

#include "link.h"

enum {
  FIRST_TIMEOUT_NS = 10000000, /* before anything is measured, beside what the wires' delays are known to be */
  LEAST_TIMEOUT_NS = 2000000,  /* a NIC that has to wait for a core is no lost packet */
  MOST_TIMEOUT_NS = 64000000,  /* a wire that comes back is noticed so soon; more when the round trip is longer */
  CLOCK_NS = 1000000,          /* least allowance for the variation of round trips */
  REORDER_NS = 100000,         /* least lateness that counts as loss, else a quarter of the round trip */
  SHARE = 64,                  /* packets of a link before the next has its turn */
};
#define KEEPALIVE_NS 1000000000ull /* of silence after which the peer is asked whether it is there */
#define NEVER UINT64_MAX

struct outstanding { /* a packet that is not acknowledged */
  uint64_t first_ns, last_ns; /* when it was transmitted */
  uint32_t attempt;           /* the newest */
  uint32_t bytes;             /* on the wire */
  bool heard;                 /* it has arrived, early */
};

struct retransmit {
  struct wire wire; /* that leads here */
  /* what arrives */
  uint64_t seen;         /* packets that entered the wire for the first time */
  uint64_t frames_seen;  /* entries of the peer's frames that did */
  uint64_t early[4];     /* bit n mod 256: packet n is there */
  bool owes;             /* an acknowledgement */
  uint64_t last_sequence; /* the packet that arrived last */
  uint32_t last_attempt;
  uint64_t priced;       /* the packet whose handling takes until ready_ns, + 1 */
  uint64_t ready_ns;
  uint64_t copied_ns;    /* when the one before was done with */
  /* what leaves */
  uint64_t acknowledged; /* packets */
  uint64_t frames;       /* published */
  struct outstanding sent[LINK_PACKETS];
  uint64_t bytes;        /* of all that is outstanding */
  uint64_t delivered_ns; /* when the newest transmission began that is known to have arrived */
  uint64_t round_trip_ns, variation_ns; /* 0: not measured */
  uint32_t backoff;      /* the timeout is doubled so often */
  uint64_t timer_ns;     /* NEVER: nothing is outstanding */
  uint64_t heard_ns;     /* since when the peer has been silent, with something outstanding */
  bool withdrawn;        /* nothing that is outstanding matters any more: the peer was given up */
  uint64_t due_ns;       /* when there is something to do */
};

static bool known_early(const struct retransmit *r, uint64_t sequence) {
  return r->early[sequence / 64 % 4] >> sequence % 64 & 1;
}

uint64_t retransmit_acknowledged(const struct link *link) { return link->retransmit->acknowledged; }

static void sooner(struct retransmit *r, uint64_t at_ns) {
  if (at_ns < r->due_ns) r->due_ns = at_ns;
}

/* ---- timer ---- */

static uint64_t far(const struct link *link, size_t field) {
  if (!link->in) return 0;
  return atomic_load_explicit((const _Atomic uint64_t *)((const char *)link->in + field), memory_order_relaxed);
}

static uint64_t delays_ns(const struct link *link) {
  const struct vmmc_control_wire *own = &link->retransmit->wire.set;
  return own->delay_ns + own->jitter_ns + far(link, offsetof(struct link_queue, wire_delay_ns));
}

static void set_timer(struct link *link, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  if (r->acknowledged == link->tail) {
    r->timer_ns = NEVER;
    sooner(r, now_ns + KEEPALIVE_NS);
    return;
  }
  uint64_t allowance = 4 * r->variation_ns > CLOCK_NS ? 4 * r->variation_ns : CLOCK_NS;
  uint64_t timeout = r->round_trip_ns ? r->round_trip_ns + allowance : FIRST_TIMEOUT_NS + 2 * delays_ns(link);
  if (timeout < LEAST_TIMEOUT_NS) timeout = LEAST_TIMEOUT_NS;
  uint64_t most = 2 * timeout > MOST_TIMEOUT_NS ? 2 * timeout : MOST_TIMEOUT_NS;
  timeout = r->backoff < 20 && timeout << r->backoff < most ? timeout << r->backoff : most;
  /* What is outstanding takes its time on a wire that is slow. */
  timeout += r->bytes * far(link, offsetof(struct link_queue, wire_ps_per_byte)) / 1000;
  r->timer_ns = now_ns + timeout;
  atomic_store_explicit(&link->out->header.counters.timeout_ns, timeout, memory_order_relaxed);
  sooner(r, r->timer_ns);
}

static void measure(struct link *link, uint64_t round_trip_ns) {
  struct retransmit *r = link->retransmit;
  uint64_t s = r->round_trip_ns;
  if (!s) {
    r->variation_ns = round_trip_ns / 2;
    r->round_trip_ns = round_trip_ns + !round_trip_ns;
  } else {
    uint64_t off = s > round_trip_ns ? s - round_trip_ns : round_trip_ns - s;
    r->variation_ns = (3 * r->variation_ns + off) / 4;
    r->round_trip_ns = (7 * s + round_trip_ns) / 8;
  }
  atomic_store_explicit(&link->out->header.counters.round_trip_ns, r->round_trip_ns, memory_order_relaxed);
}

/* ---- sending ---- */

/* Publishes a frame.  False: the peer has yet to take many others. */
static bool push(struct link *link, struct link_frame *frame) {
  struct retransmit *r = link->retransmit;
  if (!link_opened(link)) return false;
  /* acquire: the peer has read those that it says it took */
  if (r->frames - atomic_load_explicit(&link->in->frames_taken, memory_order_acquire) >= LINK_FRAMES) return false;
  frame->after = link->tail;
  link->out->frame[r->frames % LINK_FRAMES] = *frame;
  /* release: the frame before the count that publishes it */
  atomic_store_explicit(&link->out->frames, ++r->frames, memory_order_release);
  link->unrung = true;
  link_activate(link);
  return true;
}

static void note_sent(struct link *link, uint64_t sequence, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  uint32_t bytes = (uint32_t)wire_bytes(&link->out->packet[sequence % LINK_PACKETS]);
  r->sent[sequence % LINK_PACKETS] = (struct outstanding){ now_ns, now_ns, 0, bytes, false };
  r->bytes += bytes;
}

void retransmit_sent(struct link *link) {
  struct retransmit *r = link->retransmit;
  uint64_t sequence = link->tail - 1, now_ns = vmmc_now_ns();
  bool first = r->acknowledged == sequence;
  note_sent(link, sequence, now_ns);
  if (first || (r->withdrawn && link->out->packet[sequence % LINK_PACKETS].type != PACKET_GIVEN_UP)) {
    r->heard_ns = now_ns; /* from now on there is something that should be answered */
    r->withdrawn = false;
  }
  if (first) set_timer(link, now_ns);
}

static bool resend(struct link *link, uint64_t sequence, uint64_t now_ns) {
  struct outstanding *o = &link->retransmit->sent[sequence % LINK_PACKETS];
  struct link_frame frame = { .kind = FRAME_RESEND, .attempt = o->attempt + 1, .sequence = sequence };
  if (!push(link, &frame)) return false;
  o->attempt++;
  o->last_ns = now_ns;
  COUNT_LINK(link, packets_resent, 1);
  COUNT_NODE(packets_resent, 1);
  return true;
}

/* Sends again whatever was transmitted well before something that has arrived since. */
static void resend_lost(struct link *link, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  uint64_t late_ns = r->round_trip_ns / 4 > REORDER_NS ? r->round_trip_ns / 4 : REORDER_NS;
  for (uint64_t n = r->acknowledged; n < link->tail; n++) {
    const struct outstanding *o = &r->sent[n % LINK_PACKETS];
    if (!o->heard && o->last_ns + late_ns < r->delivered_ns && !resend(link, n, now_ns)) return;
  }
}

static void forget_heard(struct link *link) {
  struct retransmit *r = link->retransmit;
  for (uint64_t n = r->acknowledged; n < link->tail; n++) r->sent[n % LINK_PACKETS].heard = false;
}

static void timeout(struct link *link, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  COUNT_LINK(link, timeouts, 1);
  COUNT_NODE(timeouts, 1);
  r->backoff++;
  forget_heard(link); /* a peer whose NIC was replaced has forgotten what came early */
  /* The oldest, whose acknowledgement tells what else is lost; and, as acknowledgements are lost as well, the
   * newest, on which somebody may be waiting. */
  resend(link, r->acknowledged, now_ns);
  if (link->tail - r->acknowledged > 1) resend(link, link->tail - 1, now_ns);
  set_timer(link, now_ns);
}

/* ---- acknowledgements ---- */

static void acknowledge(struct link *link) {
  struct retransmit *r = link->retransmit;
  struct link_frame frame = { .kind = FRAME_ACKNOWLEDGE, .attempt = r->last_attempt, .sequence = r->last_sequence,
                              .acknowledged = link->taken };
  memcpy(frame.early, r->early, sizeof frame.early);
  if (push(link, &frame)) r->owes = false;
}

static void has_arrived(struct retransmit *r, struct outstanding *o) {
  /* Which transmission of one that was sent twice it was, nobody can say. */
  if (!o->heard && !o->attempt && o->first_ns > r->delivered_ns) r->delivered_ns = o->first_ns;
  o->heard = true;
}

static void acknowledged(struct link *link, const struct link_frame *frame, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  uint64_t upto = frame->acknowledged, last = frame->sequence, news = 0;
  if (upto > link->tail) return;
  r->heard_ns = now_ns;
  if (last >= r->acknowledged && last < link->tail) {
    const struct outstanding *o = &r->sent[last % LINK_PACKETS];
    uint64_t sent_ns = frame->attempt == o->attempt ? o->last_ns : frame->attempt ? 0 : o->first_ns;
    if (sent_ns) measure(link, now_ns - sent_ns);
    if (sent_ns > r->delivered_ns) r->delivered_ns = sent_ns;
  }
  for (; r->acknowledged < upto; r->acknowledged++, news++) {
    struct outstanding *o = &r->sent[r->acknowledged % LINK_PACKETS];
    has_arrived(r, o);
    r->bytes -= o->bytes;
  }
  link->out->acknowledged = r->acknowledged;
  uint64_t end = upto + LINK_PACKETS < link->tail ? upto + LINK_PACKETS : link->tail;
  for (uint64_t n = r->acknowledged; n < end; n++) {
    struct outstanding *o = &r->sent[n % LINK_PACKETS];
    if (o->heard || !(frame->early[n / 64 % 4] >> n % 64 & 1)) continue;
    has_arrived(r, o);
    news++;
  }
  if (!news) return;
  r->backoff = 0;
  set_timer(link, now_ns);
  resend_lost(link, now_ns);
  link_activate(link); /* there is room again */
}

/* ---- a peer that does not answer ---- */

static uint64_t patience_ns(const struct link *link) {
  uint64_t patience = link->far_wire ? far(link, offsetof(struct link_queue, wire_unreachable_ns))
                                     : atomic_load_explicit(&link->out->wire_unreachable_ns, memory_order_relaxed);
  return patience + 8 * delays_ns(link);
}

static bool matters(const struct link *link) {
  if (link->first || link->outbox) return true;
  for (uint64_t n = link->retransmit->acknowledged; n < link->tail; n++) {
    uint8_t type = link->out->packet[n % LINK_PACKETS].type;
    if (type != PACKET_NONE && type != PACKET_GIVEN_UP) return true;
  }
  return false;
}

/*
 * Everything with the peer ends.  Packets that are outstanding become empty ones, since the memory that they
 * refer to is the programs' again; they go on being retransmitted, as the question whether the peer is back.
 * Before anything new it is told that it was given up: what it still has of old is dead on our side.
 */
static void give_up(struct link *link, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  r->heard_ns = now_ns;
  if (!matters(link)) return;
  log_event("warning", "node%u does not answer: connections with it end", link->node);
  COUNT_LINK(link, given_up, 1);
  COUNT_NODE(peers_given_up, 1);
  /* First: a successor must tell the peer also when not all of the rest was done. */
  link->out->gave_up = 1;
  in_order();
  /* The newest first: killed in between, what is left of a stream or a send has a beginning and no gap. */
  for (uint64_t n = link->tail; n-- > r->acknowledged;)
    *(volatile uint8_t *)&link->out->packet[n % LINK_PACKETS].type = PACKET_NONE;
  /* The packets before the memory: a peer that is at one of them looks at it again when it has copied. */
  atomic_thread_fence(memory_order_seq_cst);
  r->withdrawn = true;
  link_drop_answers(link);
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    connections_given_up(e, link->node, ETIMEDOUT, false);
    commands_given_up(e, link->node);
  }
  link_activate(link);
}

static void look_at_timers(struct link *link, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  if (r->acknowledged < link->tail) {
    uint64_t last_ns = r->heard_ns + patience_ns(link);
    if (now_ns >= last_ns)
      give_up(link, now_ns);
    else if (now_ns >= r->timer_ns)
      timeout(link, now_ns);
    sooner(r, r->timer_ns);
    sooner(r, r->heard_ns + patience_ns(link));
    return;
  }
  if (now_ns >= r->heard_ns + KEEPALIVE_NS) link_reply(link, &(struct packet){ .type = PACKET_PROBE });
  sooner(r, r->heard_ns + KEEPALIVE_NS);
}

/* ---- receiving ---- */

static bool may_corrupt(const struct retransmit *r) { return r->wire.set.corrupt_ppb; }

static void enter_packet(struct link *link, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  struct link_frame frame = { .kind = FRAME_RESEND, .sequence = r->seen };
  wire_enter(link, &r->wire, &frame, r->seen, wire_bytes(&link->in->packet[r->seen % LINK_PACKETS]), now_ns);
  r->seen++;
}

/* Everything that the peer has transmitted enters the wire, in the order in which it did. */
static void take_in(struct link *link, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  const struct link_queue *in = link->in;
  /* acquire, frames first: the packets that a frame came after are counted then */
  uint64_t frames = atomic_load_explicit(&in->frames, memory_order_acquire);
  uint64_t tail = atomic_load_explicit(&in->tail, memory_order_acquire);
  for (; r->frames_seen < frames; r->frames_seen++) {
    struct link_frame frame = in->frame[r->frames_seen % LINK_FRAMES];
    while (r->seen < frame.after && r->seen < tail) enter_packet(link, now_ns);
    uint64_t number = frame.kind == FRAME_ACKNOWLEDGE ? r->frames_seen : frame.sequence;
    bool there = frame.kind == FRAME_RESEND && frame.sequence >= link->taken && frame.sequence < tail;
    static const struct packet empty;
    const struct packet *p = there ? &in->packet[frame.sequence % LINK_PACKETS] : &empty;
    wire_enter(link, &r->wire, &frame, number, wire_bytes(p), now_ns);
  }
  /* release: what it counts was read */
  atomic_store_explicit(&link->out->frames_taken, r->frames_seen, memory_order_release);
  while (r->seen < tail) enter_packet(link, now_ns);
}

/* The packet costs the receiver time, on the machine that is emulated.  True: that time has passed. */
static bool is_paid(struct link *link, const struct packet *p, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  const struct vmmc_control_wire *set = &r->wire.set;
  if (p->type != PACKET_DATA) return true;
  if (!set->stream_packet_ns && !set->stream_default_ps_per_byte && !set->stream_redirected_ps_per_byte) return true;
  if (r->priced != link->taken + 1) {
    uint64_t redirected = stream_redirected(p);
    uint64_t cost_ns = set->stream_packet_ns + (redirected * set->stream_redirected_ps_per_byte +
                                                (p->length - redirected) * set->stream_default_ps_per_byte) / 1000;
    /* While it copies it takes nothing from the wire. */
    uint64_t begin_ns = r->copied_ns + wire_time(&r->wire, wire_bytes(p));
    r->priced = link->taken + 1;
    r->ready_ns = (begin_ns > now_ns ? begin_ns : now_ns) + cost_ns;
  }
  if (r->ready_ns > now_ns) {
    sooner(r, r->ready_ns);
    return false;
  }
  r->copied_ns = r->ready_ns;
  return true;
}

/* Handles what is there, in order.  Returns how many. */
static int handle(struct link *link, bool is_carried, int most, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  int done = 0;
  for (; known_early(r, link->taken) && done < most; done++, is_carried = false) {
    struct packet p = link->in->packet[link->taken % LINK_PACKETS];
    if (!is_paid(link, &p, now_ns)) break;
    /* One that came early, and whole: it is carried again, since its bytes were not kept. */
    if (may_corrupt(r) && !is_carried && !wire_carry(link, &p, 0)) break;
    r->early[link->taken / 64 % 4] &= ~(1ull << link->taken % 64);
    link_handle(link, &p);
    wire_put_down();
    r->owes = true;
  }
  return done;
}

static int arrived(struct link *link, const struct flight *flight, int most, uint64_t now_ns) {
  struct retransmit *r = link->retransmit;
  uint64_t sequence = flight->frame.sequence;
  bool is_carried = false;
  if (sequence < link->taken || known_early(r, sequence)) {
    COUNT_LINK(link, duplicates_found, 1);
    COUNT_NODE(packets_dropped, 1);
  } else {
    if (may_corrupt(r) || flight->flips) {
      const struct packet p = link->in->packet[sequence % LINK_PACKETS];
      if (!wire_carry(link, &p, flight->flips)) {
        wire_put_down();
        COUNT_LINK(link, corrupt_found, 1);
        COUNT_NODE(packets_dropped, 1);
        return 0;
      }
      is_carried = true;
    }
    r->early[sequence / 64 % 4] |= 1ull << sequence % 64;
  }
  r->owes = true;
  r->last_sequence = sequence;
  r->last_attempt = flight->frame.attempt;
  int done = sequence == link->taken ? handle(link, is_carried, most, now_ns) : 0;
  wire_put_down();
  return done;
}

int retransmit_work(struct link *link) {
  struct retransmit *r = link->retransmit;
  uint64_t now_ns = vmmc_now_ns();
  int done = 0;
  r->due_ns = NEVER;
  if (link_opened(link)) {
    take_in(link, now_ns);
    done += handle(link, false, SHARE, now_ns); /* what waited for its time, or for others to have theirs */
    struct flight flight;
    while (done < SHARE && wire_arrived(link, &r->wire, now_ns, &flight)) {
      if (flight.frame.kind == FRAME_RESEND) {
        done += arrived(link, &flight, SHARE - done, now_ns);
      } else if (flight.flips && !wire_carry_frame(&flight.frame, flight.flips)) {
        COUNT_LINK(link, corrupt_found, 1);
        COUNT_NODE(packets_dropped, 1);
      } else {
        acknowledged(link, &flight.frame, now_ns);
      }
      done++;
    }
    if (r->owes) acknowledge(link);
  }
  look_at_timers(link, now_ns);
  sooner(r, done < SHARE ? wire_due(&r->wire) : now_ns);
  return done;
}

int unreliable_links_work(void) {
  int done = 0;
  uint64_t now_ns = vmmc_now_ns();
  for (struct link *link = nic.unreliable_links; link; link = link->next_unreliable)
    if (link->retransmit->due_ns <= now_ns) done += retransmit_work(link);
  return done;
}

uint64_t unreliable_links_due(void) {
  uint64_t due_ns = NEVER;
  for (struct link *link = nic.unreliable_links; link; link = link->next_unreliable)
    if (link->retransmit->due_ns < due_ns) due_ns = link->retransmit->due_ns;
  return due_ns;
}

/* ---- a wire becomes another ---- */

static void begin(struct link *link, uint64_t acknowledged_by_peer, uint64_t frames_seen) {
  struct retransmit *r = calloc(1, sizeof *r);
  if (!r) nic_end_for_memory("a wire that is not perfect"); /* the peer, which has some, would speak another language */
  struct link_queue *out = link->out;
  out->acknowledged = acknowledged_by_peer;
  in_order(); /* a successor that finds the next believes the one before */
  out->unreliable = 1;
  uint64_t now_ns = vmmc_now_ns();
  link->retransmit = r;
  r->seen = link->taken;
  r->frames_seen = frames_seen;
  r->frames = atomic_load_explicit(&out->frames, memory_order_relaxed);
  r->acknowledged = acknowledged_by_peer;
  r->last_sequence = NEVER;
  r->owes = true;
  r->heard_ns = now_ns;
  r->due_ns = now_ns;
  for (uint64_t n = r->acknowledged; n < link->tail; n++) note_sent(link, n, now_ns);
  wire_become(&r->wire, link->node);
  set_timer(link, now_ns);
  link->next_unreliable = nic.unreliable_links;
  nic.unreliable_links = link;
}

/* The queues are the link again: what was under way, or lost, still stands in the peer's and is read there. */
void retransmit_end(struct link *link) {
  for (struct link **at = &nic.unreliable_links; *at; at = &(*at)->next_unreliable) {
    if (*at != link) continue;
    *at = link->next_unreliable;
    break;
  }
  wire_end(&link->retransmit->wire);
  free(link->retransmit);
  link->retransmit = NULL;
  link->out->unreliable = 0;
}

void retransmit_update(struct link *link, bool changed) {
  bool wanted = link->far_wire || !wire_is_perfect(link->node);
  struct retransmit *r = link->retransmit;
  if (!wanted) {
    if (r) {
      retransmit_end(link);
      link_look_again(link);
    }
  } else if (!r) {
    link_opened(link);
    uint64_t taken = 0, frames_seen = 0;
    if (link->in) {
      taken = atomic_load_explicit(&link->in->taken, memory_order_acquire);
      frames_seen = atomic_load_explicit(&link->in->frames, memory_order_acquire); /* of an earlier time */
    }
    begin(link, taken, frames_seen);
  } else if (changed) {
    uint64_t now_ns = vmmc_now_ns();
    wire_become(&r->wire, link->node);
    r->backoff = 0;
    r->heard_ns = now_ns;
    if (r->timer_ns != NEVER) r->timer_ns = now_ns; /* what got lost before may get through now */
    r->due_ns = now_ns;
  }
  link->unrung = true;
  link_activate(link);
}

/* Goes on where a predecessor was killed, and takes up what it has not heard of. */
void retransmit_recover(struct link *link) {
  if (link_opened(link)) link->far_wire = atomic_load_explicit(&link->in->wire, memory_order_acquire);
  if (!wire_is_perfect(link->node) || atomic_load_explicit(&link->out->wire, memory_order_relaxed)) wire_publish(link);
  if (link->out->unreliable)
    begin(link, link->out->acknowledged, atomic_load_explicit(&link->out->frames_taken, memory_order_relaxed));
  if (link->out->unreliable || link->far_wire || !wire_is_perfect(link->node)) retransmit_update(link, false);
}

/* It has forgotten what came early. */
void retransmit_peer_is_new(struct link *link) {
  struct retransmit *r = link->retransmit;
  forget_heard(link);
  if (r->timer_ns == NEVER) return;
  r->timer_ns = r->due_ns = vmmc_now_ns();
}
