/*
 * vmmc_attach.h: what a program and its node's daemon, and a daemon and its NIC, say to each other.
 *
 * Plain C without preprocessor conditionals inside the structures: Python reads this same file
 * (vmmc_emu reads it with cffi), so nothing is written down twice.  All integers are in host order.
 */
#ifndef VMMC_ATTACH_H
#define VMMC_ATTACH_H
#include <stdint.h>

/* Program to daemon, over the node's Unix socket (SOCK_SEQPACKET), one message each. */
enum vmmc_attach_kind {
  VMMC_ATTACH = 1, /* answered by vmmc_attach_reply with three descriptors: app, nic, pub */
  VMMC_VISIT = 3,  /* the same, by a process that runs elsewhere: it does not end with the cluster */
  VMMC_WAKER = 2,  /* carries one descriptor that the NIC may write: waker number `waker`, or VMMC_MEMORY */
};

struct vmmc_attach_request {
  uint32_t magic;   /* VMMC_MAGIC */
  uint32_t version; /* VMMC_LAYOUT_VERSION */
  uint32_t kind;    /* enum vmmc_attach_kind */
  uint32_t waker;
};

struct vmmc_attach_reply {
  uint32_t magic;
  int32_t error; /* errno, 0: attached */
  uint32_t node;
  uint32_t nodes;
  uint32_t endpoint; /* index on the node */
  uint32_t serial;   /* never used again in this cluster's life */
  uint64_t needed_bytes; /* ENOSPC, ENOMEM: of /dev/shm for this program, */
  uint64_t free_bytes;   /* and what there is */
};

/* Daemon to NIC and back, over a socket pair (SOCK_SEQPACKET), one message each. */
enum vmmc_control_kind {
  VMMC_CONTROL_ATTACH = 1, /* daemon: serve endpoint (index, serial, pid); segments exist by name */
  VMMC_CONTROL_WAKER = 2,  /* daemon: waker `value` of that endpoint, with one descriptor; none: it was lost, for want of them */
  VMMC_CONTROL_DETACH = 3, /* daemon: its process is gone: deliver what was sent, then end it.  `value` 1: no daemon
                              knows it any more, whether it lives or not: end it, and tell it so */
  VMMC_CONTROL_ATTACHED = 8, /* NIC: it serves that endpoint, which may be said several times */
  VMMC_CONTROL_GONE = 4,   /* NIC: nothing refers to that endpoint any more: unlink its segments */
  VMMC_CONTROL_READY = 5,  /* NIC: serving */
  VMMC_CONTROL_EXPELLED = 7, /* NIC: that endpoint is served no more, its log says why; GONE follows */
  VMMC_CONTROL_WIRE = 6,   /* daemon: a wire is to be like this from now on: struct vmmc_control_wire */
  VMMC_CONTROL_LOST = 7,   /* daemon: node `value` lost its power when it had been started `serial` times */
  VMMC_CONTROL_DAMAGED = 9, /* NIC: somebody removed or truncated shared memory of node `value`, started `serial` times */
};

/* With which a NIC ends that finds its own node's shared memory so: the node is to be started anew. */
enum { VMMC_EXIT_DAMAGED = 4 };

struct vmmc_control {
  uint32_t kind; /* enum vmmc_control_kind */
  uint32_t endpoint;
  uint32_t serial;
  int32_t value; /* ATTACH: pid; WAKER: number; READY: NIC's pid; LOST, DAMAGED: node; EXPELLED: errno;
                    DETACH: 0, or 1 */
};

/*
 * One direction between two nodes, told to the NIC at its end: faults happen where packets arrive.  All
 * zero but `kind`, `from` and `up` is a perfect wire, which costs nothing.  The newest message counts; one
 * that says what is so already changes nothing.  Every random decision is a function of (seed, from, to,
 * sequence number, attempt) alone.
 */
struct vmmc_control_wire {
  uint32_t kind;          /* VMMC_CONTROL_WIRE */
  uint32_t from;          /* node at the other end */
  uint32_t up;            /* 0: nothing gets through */
  uint32_t loss_ppb;      /* of a milliard packets, how many are lost, */
  uint32_t corrupt_ppb;   /* have bits flipped, */
  uint32_t duplicate_ppb; /* come twice, */
  uint32_t reorder_ppb;   /* are held back so that later ones overtake them */
  uint32_t limit_packets; /* that may be under way at a time, the next is dropped; 0: no limit */
  uint64_t delay_ns;      /* from end to end, */
  uint64_t jitter_ns;     /* more or less by up to so much; order is kept */
  uint64_t rate_bits_per_s; /* 0: no limit */
  uint64_t seed;
  uint64_t unreachable_ns; /* of silence after which the sender gives its peer up; 0: the default */
  uint64_t stream_packet_ns; /* what the receiver's work costs: for each packet of a stream, and for each */
  uint64_t stream_redirected_ps_per_byte; /* of its bytes that goes to a posted address, */
  uint64_t stream_default_ps_per_byte;    /* or to the default buffer and is copied from there, in ps */
};

#endif
