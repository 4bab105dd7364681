/*
 * vmmc_inspect.h: what an observer outside the cluster can see: counters, endpoints, sockets.
 *
 * Everything is read from the cluster's segments, by name and read-only, without a word to any process:
 * observing costs the data path nothing.  What programs wrote is not trusted: text is made printable,
 * numbers are bounded, a segment that vanishes meanwhile counts as empty.
 *
 * Functions that fill an array return how many there are (which may be more than `most`, then only that
 * many were filled), or -1 with errno set: ENOENT when the node is not there, EINVAL for a bad name.
 * vmmc_emu (Python) reads this header: keep it plain C.
 */
#ifndef VMMC_INSPECT_H
#define VMMC_INSPECT_H

#include <stdint.h>

#include "vmmc.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of a segment: "app", "nic", "own" (of an endpoint), "pub", "door", "state" (of a node); the app
 * and nic sizes are address space, committed as used.  Also "magic" and "version" of the layout, and
 * limits: "nodes", "endpoints", "ring", "heap"; and where in "pub" the serials of the endpoints that are "served"
 * lie.  0: no such thing. */
VMMC_API uint64_t vmmc_layout_size(const char *what);

/* Not an observer's: says to the process whose `.nic` segment is in that file that the NIC that served it is gone for
 * good, and why, and ends its VMMC calls (ENETDOWN).  Only who took the node away may; 0, or -1 with errno set. */
VMMC_API int vmmc_tell_gone(const char *path, const char *why);

/* Likewise, to the NICs of a node's peers, that the node whose `pub` is in that file has lost its power. */
VMMC_API int vmmc_tell_off(const char *path);

struct vmmc_counter {
  const char *name;    /* static */
  const char *meaning; /* static, one line */
  uint64_t value;
};

/* The counters of a node: what its NIC counted and what the libraries of its programs did, those that are
 * gone included.  Always the same names in the same order. */
VMMC_API int vmmc_node_counters(const char *cluster, uint32_t node, struct vmmc_counter *counters, int most);

/* The same of one endpoint, by serial. */
VMMC_API int vmmc_endpoint_counters(const char *cluster, uint32_t node, uint32_t serial,
                                    struct vmmc_counter *counters, int most);

/* Those of one direction between two nodes: of the wire at its end, and of the link at its beginning.  Always
 * the same names; all 0 while the two have not talked. */
VMMC_API int vmmc_link_counters(const char *cluster, uint32_t from, uint32_t to, struct vmmc_counter *counters,
                                int most);

struct vmmc_node_info {
  uint32_t node, nodes;
  uint32_t incarnation; /* how many NIC processes have served this node */
  int32_t nic_pid;
  uint32_t asleep;      /* its NIC sleeps, or is about to */
  uint32_t endpoints;   /* programs attached */
};
VMMC_API int vmmc_node_info(const char *cluster, uint32_t node, struct vmmc_node_info *info);

struct vmmc_endpoint_info {
  uint32_t endpoint, serial; /* index on the node; never used again in the cluster's life */
  int32_t pid;               /* as the program says */
  char command[20];
};
VMMC_API int vmmc_endpoints(const char *cluster, uint32_t node, struct vmmc_endpoint_info *endpoints,
                            int most);

struct vmmc_socket_info {
  char state[12];         /* as ss names them: LISTEN, SYN-SENT, ESTAB, FIN-WAIT, CLOSE-WAIT, … */
  char local[64];         /* address:port, [address]:port */
  char peer[64];          /* the same, "*:*" where there is none */
  uint64_t receive_queue; /* bytes that the program has yet to read; LISTEN: connections to accept */
  uint64_t send_queue;    /* bytes written that the NIC has yet to send; LISTEN: the backlog */
  uint64_t received, sent; /* bytes in all */
  int32_t error;          /* errno of a dead connection, 0: none */
  int32_t pid;
  uint32_t serial, slot;
  char command[20];
};
VMMC_API int vmmc_sockets(const char *cluster, uint32_t node, struct vmmc_socket_info *sockets, int most);

#ifdef __cplusplus
}
#endif
#endif
