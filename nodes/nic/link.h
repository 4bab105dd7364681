/*
 * link.h: a link from the inside: for link.c, which orders packets, retransmit.c, which gets them across a wire
 * that loses them, and wire.c, which is that wire.
 */
#ifndef NIC_LINK_H
#define NIC_LINK_H

#include "nic.h"

struct outbox { /* answers that found no room */
  struct outbox *next;
  struct packet packet;
};
struct busy { /* a connection that waits for RETRY */
  uint32_t index, serial, slot, generation;
};

/* What one program has to say.  Lanes take turns, so that no program waits for all that another has. */
struct lane {
  struct lane *next;          /* in its link's queue, while it has any work */
  struct work *first, *last;
  uint64_t ahead;             /* bytes that it sent beyond its share of this turn */
};

struct link {
  uint32_t node;
  struct link_queue *out;       /* ours */
  const struct link_queue *in;  /* the peer's, NULL until it made it */
  struct vmmc_door *door;       /* the peer's */
  const struct vmmc_pub *pub;   /* the peer's */
  uint32_t incarnation;         /* of the peer's NIC, as last seen */
  uint32_t far_wire;            /* in->wire, as last seen */
  struct retransmit *retransmit; /* NULL: the wire is perfect both ways, and the queues are the link */
  uint64_t tail;                /* packets filled by us, published at the next ring */
  uint64_t taken;               /* packets of `in` handled */
  uint64_t again;               /* packets before this may have been handled by a predecessor */
  bool unrung;                  /* published something since the peer's doorbell was rung */
  struct lane *first, *last;    /* programs with something to say: connections and commands */
  struct lane *serving;         /* whose turn it is: not in the queue meanwhile */
  struct outbox *outbox, **outbox_end;
  struct busy *busy;
  uint32_t busy_count, busy_size;
  bool in_busy_links;
  struct link *next_busy;       /* in nic.busy_links */
  struct link *next_unreliable; /* in nic.unreliable_links */
  struct lane lane[VMMC_ENDPOINTS_MAX]; /* by the endpoint's index; pages that no program uses are never touched */
};

#define COUNT_LINK(link, name, n) COUNT_IN(&(link)->out->header.counters, name, n)

/* ---- link.c ---- */
bool link_opened(struct link *link);
void link_activate(struct link *link);
void link_handle(struct link *link, const struct packet *p); /* the next in order; counts it as taken */
void link_look_again(struct link *link);
void link_drop_answers(struct link *link); /* and what waits for RETRY */

/* ---- retransmit.c ---- */
void retransmit_update(struct link *link, bool changed); /* after a wire, this way or that, became another */
void retransmit_recover(struct link *link);
void retransmit_end(struct link *link);
void retransmit_sent(struct link *link); /* the newest packet, just published */
uint64_t retransmit_acknowledged(const struct link *link);
int retransmit_work(struct link *link);
void retransmit_peer_is_new(struct link *link);

/* ---- wire.c ---- */
struct wire {
  struct vmmc_control_wire set; /* as the daemon told */
  uint64_t key;     /* of every random decision: seed and direction */
  uint64_t free_ns; /* when its rate lets the next packet begin */
  uint64_t last_ns; /* when the newest packet that keeps its place arrives */
  uint64_t order;   /* packets that entered */
  struct flight *heap; /* those under way, the next to arrive first */
  uint32_t count, size;
};

struct flight { /* a packet under way */
  uint64_t arrives_ns, order;
  struct link_frame frame;
  uint64_t flips; /* 0: whole; else which bits are flipped */
};

bool wire_is_perfect(uint32_t from);
void wire_become(struct wire *wire, uint32_t from); /* what the daemon said of it last */
void wire_end(struct wire *wire);
void wire_publish(struct link *link); /* to the peer: what its link has to cope with */
void wire_enter(struct link *link, struct wire *wire, const struct link_frame *frame, uint64_t number,
                uint64_t bytes, uint64_t now_ns);
bool wire_arrived(struct link *link, struct wire *wire, uint64_t now_ns, struct flight *flight);
uint64_t wire_due(const struct wire *wire); /* when the next arrives; UINT64_MAX: none is under way */
uint64_t wire_bytes(const struct packet *p);
uint64_t wire_time(const struct wire *wire, uint64_t bytes); /* ns that so many take at its rate */

/* Carries a packet whose bytes count: into a frame of its own, with a checksum, bits flipped as said.  True:
 * the checksum is right, and until the next call link_carried() has the payload. */
bool wire_carry(struct link *link, const struct packet *p, uint64_t flips);
bool wire_carry_frame(const struct link_frame *frame, uint64_t flips); /* the same of an acknowledgement */
void wire_put_down(void); /* nothing is carried any more */

#endif
