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
  VMMC_WAKER = 2,  /* carries one event descriptor that the NIC may write: waker number `waker` */
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
  VMMC_CONTROL_WAKER = 2,  /* daemon: waker `value` of that endpoint, with one descriptor */
  VMMC_CONTROL_DETACH = 3, /* daemon: its process is gone: deliver what was sent, then end it */
  VMMC_CONTROL_GONE = 4,   /* NIC: nothing refers to that endpoint any more: unlink its segments */
  VMMC_CONTROL_READY = 5,  /* NIC: serving */
};

struct vmmc_control {
  uint32_t kind; /* enum vmmc_control_kind */
  uint32_t endpoint;
  uint32_t serial;
  int32_t value; /* ATTACH: pid; WAKER: number; READY: NIC's pid */
};

#endif
