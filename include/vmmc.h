/*
 * vmmc.h: virtual memory-mapped communication between the nodes of an emulated cluster.
 *
 * A process attaches to a node and gets an endpoint with a heap.  It exports buffers of that heap under
 * a name, with permissions; another process imports one and may then send from its own heap straight
 * into it, or fetch from it: one-sided, no receive call.  A send may ask for a notification, which runs
 * a handler in, or wakes, the process that exported the buffer once the data is in place.  The owner of
 * an exported buffer may post a redirection: bytes meant for the buffer then go to another address,
 * which senders know nothing of.
 *
 * Functions return 0 (or what they say) on success, and -1 (or NULL) with errno set on failure:
 *
 *   EINVAL        an argument makes no sense: a range that is not in the exported buffer, an unknown id
 *   EFAULT        memory outside what vmmc_alloc handed out
 *   EPERM         the buffer is not exported to this node, not for this kind of access, or not imported
 *   ENOMEM        no room in the heap, in /dev/shm, or within the bound of pinned memory
 *   ENOENT        no such export, or no such cluster
 *   EEXIST        the node has an export of that name already
 *   EBUSY         the memory or export is in use
 *   EAGAIN        too many transfers are under way
 *   ENOBUFS       a send's data is in place, but the owner's ring of notifications is full
 *   EHOSTUNREACH  the cluster has no such node, or it is off
 *   ECONNRESET    the buffer was unexported, or this endpoint has ended
 *   ENETDOWN      the NIC serves this program no more, or is gone with its node; stderr has a line that says why
 *   ETIMEDOUT     it lasted longer than timeout_ms; EINTR: a signal handler ran meanwhile
 *   EBADF         this process is a child of fork: the endpoint is its parent's
 *
 * Timeouts are in milliseconds: 0 looks once, -1 waits for ever.  All functions may be called from any
 * thread; none is async-signal-safe.  vmmc_emu (Python) reads this header: keep it plain C.
 */
#ifndef VMMC_H
#define VMMC_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#define VMMC_API __attribute__((visibility("default")))

struct vmmc_endpoint;

enum {
  VMMC_HERE = -1,     /* vmmc_attach: the node that this program runs on (`vmmc-emu run`) */
  VMMC_ANYONE = -1,   /* vmmc_export: every node may import it */
  VMMC_EVERY = -1,    /* notifications: of every export */
  VMMC_WRITE = 1,     /* permission to send into a buffer */
  VMMC_READ = 2,      /* permission to fetch from a buffer */
  VMMC_NOTIFY = 1,    /* vmmc_send: notify the owner of the buffer when the data is in place */
  VMMC_NAME_BYTES = 32, /* of an export's name, without the final NUL */
};

/* ---- attach ---- */

/*
 * Attaches this process to a node of a running cluster of this user.  cluster NULL: $VMMC_CLUSTER, or
 * "default".  node VMMC_HERE: the node that the environment names; that endpoint is the one which the
 * process's stream sockets use, is attached once, and every such call must be paired with a detach.
 * Otherwise each call makes an endpoint of its own: one process may be on several nodes at once.
 * ENOENT: no such cluster is up; EHOSTUNREACH: it has no such node; ENOTCONN: VMMC_HERE without a node.
 */
VMMC_API struct vmmc_endpoint *vmmc_attach(const char *cluster, int node);

/* Ends the endpoint and unmaps its heap.  Peers see their imports of its buffers fail (ECONNRESET).
 * EDEADLK: called by a notification handler. */
VMMC_API int vmmc_detach(struct vmmc_endpoint *endpoint);

/* The first half of vmmc_detach: the endpoint ends, calls that wait return ECONNRESET, but the heap stays
 * mapped until vmmc_detach, for languages whose views of it may live on. */
VMMC_API int vmmc_end(struct vmmc_endpoint *endpoint);

VMMC_API uint32_t vmmc_node(const struct vmmc_endpoint *endpoint);   /* its node's index */
VMMC_API uint32_t vmmc_nodes(const struct vmmc_endpoint *endpoint);  /* nodes of the cluster */
VMMC_API uint32_t vmmc_serial(const struct vmmc_endpoint *endpoint); /* as in vmmc_notice.sender */

/* ---- memory ---- */

/* Zeroed memory of the endpoint's heap (1 GiB), page-aligned, in whole pages, committed: no store into
 * it can fail.  Only such memory can be exported, sent from, fetched to and redirected to. */
VMMC_API void *vmmc_alloc(struct vmmc_endpoint *endpoint, uint64_t length);

/* Gives it back to the machine.  EBUSY: a transfer, an export or a redirection uses it. */
VMMC_API int vmmc_free(struct vmmc_endpoint *endpoint, void *memory);

/* What the UTLB of this endpoint holds.  limit_bytes is VMMC_PIN_BYTES of the environment (64 MiB). */
struct vmmc_pinned {
  uint64_t limit_bytes;  /* never more than this is pinned */
  uint64_t pinned_bytes; /* pinned now */
  uint64_t in_use_bytes; /* of those, used by exports, redirections and transfers under way */
  uint64_t pins, unpins; /* pages pinned, and unpinned to make room for others, in all */
};
VMMC_API int vmmc_pinned(struct vmmc_endpoint *endpoint, struct vmmc_pinned *pinned);

/* ---- export and import ---- */

/* Lets node `whom` (or VMMC_ANYONE) send into and fetch from [memory, memory + length), as
 * `permissions` (VMMC_WRITE | VMMC_READ) say.  `name` (at most 32 bytes) is unique on the node; NULL: it
 * can be imported by number only.  The memory stays pinned while it is exported (ENOMEM beyond the
 * bound).  Returns the export's id in this endpoint, from 0. */
VMMC_API int vmmc_export(struct vmmc_endpoint *endpoint, void *memory, uint64_t length, const char *name,
                         uint32_t permissions, int whom);

/* Once it returns, nothing writes into the buffer any more.  A posted redirection is cancelled, and
 * notifications not yet taken are dropped. */
VMMC_API int vmmc_unexport(struct vmmc_endpoint *endpoint, int export_id);

/* The number by which this export can be imported from another node: unique on its node. */
VMMC_API int64_t vmmc_export_number(struct vmmc_endpoint *endpoint, int export_id);

struct vmmc_import {
  uint32_t id;          /* for vmmc_send and vmmc_fetch */
  uint32_t node;        /* where the buffer is */
  uint64_t length;      /* bytes of the exported buffer */
  uint32_t permissions; /* VMMC_WRITE | VMMC_READ */
};

/* Imports what `node` exports under `name` or number.  ENOENT: it exports no such thing; EPERM: not to
 * this node. */
VMMC_API int vmmc_import(struct vmmc_endpoint *endpoint, uint32_t node, const char *name,
                         struct vmmc_import *import, int timeout_ms);
VMMC_API int vmmc_import_number(struct vmmc_endpoint *endpoint, uint32_t node, uint32_t number,
                                struct vmmc_import *import, int timeout_ms);
VMMC_API int vmmc_unimport(struct vmmc_endpoint *endpoint, uint32_t import_id);

/* ---- transfers ---- */

/*
 * Sends [source, source + length) to [remote_offset, + length) of the imported buffer, and returns when
 * it is in place there.  Sends to one node arrive in the order in which they were given.  flags:
 * VMMC_NOTIFY, with a `tag` for the receiver.  length: up to 1 GiB, and 0 is fine (a notification alone).
 * After ETIMEDOUT or EINTR it is still under way: the data may yet arrive, and vmmc_free says EBUSY until
 * it is over.
 */
VMMC_API int vmmc_send(struct vmmc_endpoint *endpoint, uint32_t import_id, const void *source,
                       uint64_t length, uint64_t remote_offset, uint32_t flags, uint32_t tag,
                       int timeout_ms);

/* The other way round: copies the imported buffer's [remote_offset, + length) to `destination`. */
VMMC_API int vmmc_fetch(struct vmmc_endpoint *endpoint, uint32_t import_id, void *destination,
                        uint64_t length, uint64_t remote_offset, int timeout_ms);

/*
 * The same without waiting: they return a transfer (> 0) to be given to vmmc_wait, or -1.  A transfer
 * larger than half the bound of pinned memory goes in pieces, which follow each other while somebody
 * waits for, or tests, any transfer.  EAGAIN: too many are under way (1024).
 */
VMMC_API int64_t vmmc_post_send(struct vmmc_endpoint *endpoint, uint32_t import_id, const void *source,
                                uint64_t length, uint64_t remote_offset, uint32_t flags, uint32_t tag);
VMMC_API int64_t vmmc_post_fetch(struct vmmc_endpoint *endpoint, uint32_t import_id, void *destination,
                                 uint64_t length, uint64_t remote_offset);

/* Waits until the transfer is complete, and reports how it ended: 0, or -1 with its errno.  The transfer
 * is then over and its number means nothing any more; after ETIMEDOUT and EINTR it goes on. */
VMMC_API int vmmc_wait(struct vmmc_endpoint *endpoint, int64_t transfer, int timeout_ms);

/* Says that nobody will wait for it. */
VMMC_API int vmmc_forget(struct vmmc_endpoint *endpoint, int64_t transfer);

/* ---- notifications ---- */

struct vmmc_notice {
  int32_t export_id; /* the buffer that a send arrived in */
  uint32_t node;     /* whose send it was: its node, */
  uint32_t sender;   /* the serial of its endpoint, */
  uint32_t tag;      /* and what it said */
  uint64_t offset, length; /* what arrived, in the exported buffer */
};

/* Takes the oldest notification of that export (or VMMC_EVERY: of every export without a handler),
 * waiting for one if need be.  Notifications wait in a ring of 1024 for the whole endpoint: once one that
 * nobody takes is so far behind, sends that ask for another fail with ENOBUFS. */
VMMC_API int vmmc_notification(struct vmmc_endpoint *endpoint, int export_id, struct vmmc_notice *notice,
                               int timeout_ms);

/* Has `handler` called for each notification of that export, in order, by a thread of the library that
 * runs all handlers of this endpoint, one at a time.  NULL: no more; on return none runs any more, unless
 * the caller is that handler itself. */
typedef void vmmc_handler(const struct vmmc_notice *notice, void *context);
VMMC_API int vmmc_on_notification(struct vmmc_endpoint *endpoint, int export_id, vmmc_handler *handler,
                                  void *context);

/* ---- redirection ---- */

/* What has arrived in an export so far, wherever it was put. */
struct vmmc_arrived {
  uint64_t bytes; /* in all */
  uint64_t sends; /* that have arrived whole, in all */
};
VMMC_API int vmmc_arrived(struct vmmc_endpoint *endpoint, int export_id, struct vmmc_arrived *arrived);

/*
 * Posts a redirection: bytes that senders address to [offset, offset + length) of the exported buffer go
 * to `destination` from now on, as one ascending run: it begins with the first byte that arrives inside
 * that range, goes on with whatever continues it, and ends where the range ends.  A byte at offset o goes
 * to destination + (o - offset).  Everything else goes to the buffer as before.  Nothing is copied by this
 * call: what had arrived before is in the buffer, and vmmc_redirect_end tells where the run began.
 * EBUSY: one is posted already.  The destination is pinned until the redirection ends.
 */
VMMC_API int vmmc_redirect(struct vmmc_endpoint *endpoint, int export_id, uint64_t offset, uint64_t length,
                           void *destination);

/* Where bytes went: [from, to) of the exported buffer's offsets went to the destination, and no others.
 * What a message addressed outside of it, before or after, is in the buffer. */
struct vmmc_redirected {
  uint64_t from, to; /* equal: none did */
};

/* Looks, or waits, until the run has reached `upto` (an offset of the exported buffer).  The redirection
 * stays posted, also after ETIMEDOUT. */
VMMC_API int vmmc_redirect_wait(struct vmmc_endpoint *endpoint, int export_id, uint64_t upto,
                                struct vmmc_redirected *redirected, int timeout_ms);

/* Ends it.  On return nothing is written to the destination any more, and *redirected is final. */
VMMC_API int vmmc_redirect_end(struct vmmc_endpoint *endpoint, int export_id,
                               struct vmmc_redirected *redirected);

#ifdef __cplusplus
}
#endif
#endif
