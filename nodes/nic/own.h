/*
 * own.h: what a NIC must remember, in segments that only it writes and only it (and its successor)
 * maps: `own` of each endpoint, `state` of the node, `link` to each peer.
 *
 * A NIC can be killed between any two of its stores.  So of each change one store makes it count; what
 * comes before that is done again by the successor, and what follows from it (lists, numbers of things,
 * what the app is shown) the successor derives anew.
 */
#ifndef NIC_OWN_H
#define NIC_OWN_H

#include "packet.h"
#include "vmmc_attach.h"
#include "vmmc_layout.h"

enum connection_state {
  CONNECTION_NONE,       /* the slot is free */
  CONNECTION_IDLE,       /* taken by the app, perhaps bound */
  CONNECTION_LISTENING,
  CONNECTION_CONNECTING, /* CONNECT is to be sent or was */
  CONNECTION_BUSY,       /* the peer's backlog is full */
  CONNECTION_ESTABLISHED,
  CONNECTION_CLOSING,    /* CLOSE or RESET is sent: waits for CLOSED */
  CONNECTION_DEAD,       /* nothing is left to say to the peer; the app has yet to close */
};

enum { /* connection.flags */
  SAID_CONNECT = 1,
  SAID_FIN = 2,
  HEARD_FIN = 4,
  HEARD_CLOSE = 8,
  SAID_RESET = 16,    /* CLOSING by RESET instead of CLOSE */
  APP_CLOSED = 32,    /* the app closed the slot while it was still connecting */
  PASSIVE = 64,
  CONNECT_AGAIN = 128,  /* CONNECT may have been handled by a NIC that has died since */
  UNQUEUED = 256,       /* passive: not yet known to stand in its listener's queue */
  TELL_AGAIN = 512,     /* the limit is to be told again, and whether the peer is there is to be asked */
  TELL_PLACED = 1024,   /* the peer asked how far its bytes have come */
  SAY_IDLE = 2048,      /* RECALL is to be sent */
  WELCOMED = 4096,      /* shown to the app as established before the peer answered: its node welcomed it (port.c) */
};

struct connection {
  union {
    struct {
      uint32_t generation;
      uint32_t state; /* enum connection_state */
    };
    uint64_t identity; /* both, stored at once when the slot begins */
  };
  uint32_t flags;
  uint32_t requested;           /* newest request that was answered, with: */
  int32_t answer;               /* 0 or an errno */
  uint32_t asked;               /* newest request that began to take effect */
  struct vmmc_address local, peer;
  struct packet_end far;        /* the peer's end */
  uint32_t far_node;
  uint32_t binding;             /* index + 1 in node_state.binding, 0: none */
  uint64_t transmitted;         /* bytes handed to the link */
  uint64_t far_limit;           /* position up to which the peer takes bytes */
  uint64_t acknowledged;        /* bytes that the peer said it has */
  uint64_t asked_placed;        /* `transmitted` when the peer was last asked for that */
  uint64_t placed;              /* bytes in the default buffer or redirected; listening: entries × 8 */
  uint64_t consumed;            /* newest checked value of the app's */
  uint64_t told;                /* limit told to the peer */
  uint32_t recall, recalling;   /* number of the newest RECALL; 1: its answer counts, since no limit was told after it */
  uint64_t grown;               /* what was read when the window last grew */
  uint64_t entry;               /* passive: where it stands in its listener's queue */
  uint32_t listener;            /* passive: the slot that it was accepted for */
  uint32_t bind_flags;          /* passive: VMMC_BIND_* of that one, for others that want its port */
  uint32_t window;
  uint32_t backlog;             /* listening */
  /* The default buffer's places of [committed_from, committed_to) are allocated; kept across uses. */
  uint64_t committed_from, committed_to;
  uint64_t waiting[VMMC_NODES_MAX / 64]; /* listening: nodes that were told BUSY */
  uint32_t next_free;           /* passive and free: the next one + 1 */
};

struct own_export {
  uint32_t generation; /* 0: not in use since the endpoint began */
  uint32_t used;
  uint64_t offset, length;
  uint32_t permissions, node;
  char name[VMMC_NAME_MAX + 1];
};

struct own_import {
  uint32_t used;
  uint32_t node;
  struct packet_end far; /* endpoint, serial; slot: export id; generation: of the export */
  uint64_t length;
  uint32_t permissions;
};

enum command_state {
  COMMAND_NONE,
  COMMAND_WAITS,    /* to be sent to the peer, or (a transfer) with pieces left to send */
  COMMAND_ANSWER,   /* everything was sent, the answer is awaited */
};

struct own_command { /* the command that was taken, checked */
  struct vmmc_command command;
  uint32_t state; /* enum command_state */
  struct own_import import; /* transfers: as it was when the command was taken */
  uint64_t effected;        /* index + 1 of the newest command here that began to take effect */
  uint64_t moved;           /* bytes of a transfer that were sent or fetched */
  uint64_t after;           /* SEND: index + 1 of the endpoint's send to that node before this; 0: none */
};

/* The newest send of a program that arrived whole: when its NIC repeats it, it is only answered. */
struct own_sender {
  uint32_t node, serial; /* whose */
  uint64_t arrived;      /* index + 1, 0: none */
};

/* What the arrival of a send is about to change, so that a successor changes the same and no more. */
struct own_arrival {
  uint64_t arriving; /* index + 1 of the send, 0: none; stored last, cleared when all is done */
  uint64_t arrivals; /* of the export, this one included */
  uint64_t notifications; /* of the endpoint likewise */
  uint32_t notify;
  struct vmmc_notification notification;
};

/* In sets, by node and serial: of more than so many that share a set some are forgotten. */
enum { SENDERS = 1024, SENDER_WAYS = 8 };

struct own {
  uint32_t magic, version, serial;
  uint32_t open;            /* connections not NONE */
  uint32_t active_end;      /* one past the highest active slot ever used */
  uint32_t passive_end;     /* the same for passive slots */
  uint32_t free_passive;    /* index + 1, chained by next_free */
  uint32_t pad;
  struct own_command command[VMMC_COMMANDS];
  struct own_export export[VMMC_EXPORTS];
  struct own_import import[VMMC_EXPORTS];
  struct own_arrival arrival;
  struct own_sender sender[SENDERS];
  struct connection connection[VMMC_SLOTS];
};

/* A socket's claim to a port. */
struct binding {
  uint32_t used;
  uint32_t next; /* index + 1 of the next in this bucket */
  uint32_t endpoint, serial, slot, generation;
  uint32_t flags; /* VMMC_BIND_* */
  uint32_t listening;
  struct vmmc_address address;
};

enum { BINDINGS = 65536, BINDINGS_STEP = 64 /* committed at a time */, PORT_BUCKETS = 512, STATE_BYTES = 64 << 20, OWN_BYTES = 64 << 20 };

struct node_state {
  uint32_t magic, version;
  uint32_t next_ephemeral;
  uint32_t free_binding; /* index + 1 of a freed one, chained by next */
  uint32_t bindings_end; /* one past the highest ever used */
  uint32_t round_robin;  /* among listeners that share a port */
  uint32_t bucket[PORT_BUCKETS]; /* index + 1 of the first binding whose port is this, mod PORT_BUCKETS */
  struct binding binding[BINDINGS];
  struct vmmc_control_wire wire[VMMC_NODES_MAX]; /* that leads here from each node; kind 0: never told of */
};

/*
 * A transmission that is not a packet's first: over a wire that can lose packets.  First transmissions need no
 * entry: packet n, published, was transmitted.
 */
enum { FRAME_RESEND, FRAME_ACKNOWLEDGE };
struct link_frame {
  _Alignas(VMMC_LINE) uint64_t after; /* packets whose first transmission was before this one */
  uint32_t kind;
  uint32_t attempt;  /* RESEND: of this packet, the first being 0.  ACKNOWLEDGE: of the packet that arrived last */
  uint64_t sequence; /* of the packet; ACKNOWLEDGE: of the one that arrived last */
  uint64_t acknowledged; /* ACKNOWLEDGE: packets handled in order, */
  uint64_t early[4];     /* and bit n mod 256: packet n, later than those, is there */
};

/* The queue of packets to one peer.  Writer: the sending NIC; mapped read-only by the peer's. */
enum { LINK_PACKETS = 256, LINK_FRAMES = 128 };
struct link_queue {
  struct vmmc_link_header header;
  _Alignas(VMMC_LINE) _Atomic uint64_t tail;      /* packets published */
  _Atomic uint32_t wire;           /* not 0: the wire from the peer to us is not perfect; another number after
                                      each change.  The peer then retransmits */
  _Atomic uint64_t wire_delay_ns;  /* of it, at most */
  _Atomic uint64_t wire_ps_per_byte;
  _Atomic uint64_t wire_unreachable_ns;
  _Alignas(VMMC_LINE) _Atomic uint64_t taken;     /* packets of the opposite queue that were handled */
  _Alignas(VMMC_LINE) _Atomic uint64_t want_room; /* ring me when you have taken this many; ~0: no */
  _Alignas(VMMC_LINE) _Atomic uint64_t frames;    /* published */
  _Atomic uint64_t frames_taken;   /* of the opposite queue's */
  /* What a successor goes on from where acknowledgements travel over the wire: */
  uint32_t unreliable;   /* they do: `taken` of the opposite queue is not ours to look at */
  uint32_t gave_up;      /* the peer is given up, and not told yet */
  uint64_t acknowledged; /* packets */
  _Alignas(VMMC_LINE) struct packet packet[LINK_PACKETS];
  struct link_frame frame[LINK_FRAMES];
};
_Static_assert(sizeof(struct link_frame) == VMMC_LINE, "one line");

_Static_assert(sizeof(struct own) <= OWN_BYTES, "own fits");
_Static_assert(sizeof(struct node_state) <= STATE_BYTES, "state fits");

#endif
