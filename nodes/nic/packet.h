/* packet.h: what two NICs say to each other.  NICs trust each other; programs write none of this. */
#ifndef NIC_PACKET_H
#define NIC_PACKET_H

#include "vmmc_layout.h"

enum packet_type {
  PACKET_NONE,
  /* connections */
  PACKET_CONNECT,  /* local, peer, limit: will you accept */
  PACKET_ACCEPTED, /* source: the new connection; limit */
  PACKET_REFUSED,  /* error */
  PACKET_BUSY,     /* backlog full: wait for RETRY */
  PACKET_RETRY,    /* to a node, not a connection: its BUSY connections may ask again */
  PACKET_DATA,     /* position, length: bytes in the sender's transmit ring; limit */
  PACKET_CREDIT,   /* limit, placed */
  PACKET_FIN,      /* position: the stream's end; limit */
  PACKET_CLOSE,    /* the same, and the sender reads no more; answered by CLOSED */
  PACKET_RESET,    /* the connection is dead; answered by CLOSED when `flags` asks */
  PACKET_CLOSED,   /* nothing of the connection is left here that could refer to yours */
  PACKET_RECALL,   /* idle: credit above `limit` is taken back unless it is used, or told anew; answered by: */
  PACKET_RECALLED, /* limit: what is left of the credit; placed; recall, as in the question */
  /* VMMC */
  PACKET_IMPORT,   /* name or id */
  PACKET_IMPORTED, /* error, id, generation, length, flags: permissions */
  PACKET_SEND,     /* a piece: remote (in the export), position (in the source heap), length */
  PACKET_SENT,     /* error, or the last piece is placed */
  PACKET_FETCH,    /* a piece: remote, length */
  PACKET_FETCHED,  /* error, or position: where in the exporter's heap the piece can be copied from */
  PACKET_GONE,     /* endpoint `source` has ended: forget its memory */
  /* links */
  PACKET_PROBE,    /* are you there?  Its acknowledgement is the answer */
  PACKET_GIVEN_UP, /* you were not: all that was under way between us is given up */
};

enum { /* packet.flags */
  PACKET_LAST = 1,        /* SEND: the last piece */
  PACKET_NOTIFY = 2,      /* SEND: notify with the last piece */
  PACKET_WANT_CLOSED = 4, /* RESET: answer with CLOSED */
  PACKET_MORE = 8,        /* SEND: the transfer goes on with another command: not yet an arrival */
  PACKET_WANT_PLACED = 16, /* DATA, CREDIT: answer with CREDIT: how far the bytes are there */
  PACKET_AGAIN = 32,      /* CONNECT: perhaps handled before, by a NIC that has died since; CREDIT: are you there? */
};

/* One end: the slot of a connection, or the command (VMMC) of an endpoint. */
struct packet_end {
  uint32_t endpoint, serial, slot, generation;
};

struct packet {
  _Alignas(VMMC_LINE) uint64_t sequence; /* of the link */
  uint8_t type;                          /* enum packet_type */
  uint8_t flags;
  uint16_t error; /* errno */
  uint32_t length;
  struct packet_end to, from;
  uint64_t position;
  uint64_t limit; /* stream position up to which the other side may write */
  union {
    struct { /* CONNECT */
      struct vmmc_address local, peer;
    };
    struct { /* DATA, CREDIT, FIN, RECALL, RECALLED */
      uint64_t placed; /* bytes of the other side that have arrived */
      uint32_t recall; /* which RECALL */
      uint32_t offset; /* DATA: where byte `position` lies in the sender's transmit ring */
    };
    struct { /* VMMC */
      uint64_t command;  /* index of the command */
      uint64_t remote;   /* offset in the exported buffer */
      uint64_t total;    /* IMPORTED: bytes of the export; SEND: bytes that a notification speaks of */
      uint32_t export_id;
      uint32_t tag;
      char name[VMMC_NAME_MAX];
    };
  };
};

_Static_assert(sizeof(struct packet) == 2 * VMMC_LINE, "two lines");

#endif
