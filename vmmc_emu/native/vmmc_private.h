/*
 * vmmc_private.h: what the files behind vmmc.h share: one attachment and the state of its parts.
 *
 *   vmmc.c      attach, detach, how a call begins and waits
 *   heap.c      the allocator of the endpoint's heap
 *   utlb.c      which of its pages are pinned, and the bound
 *   transfer.c  commands to the NIC: queued, cut into pieces, completed; send and fetch
 *   export.c    export, unexport, import, unimport
 *   redirect.c  redirection of an export
 *   notify.c    notifications: taken by waiting, or by handlers in a thread
 *
 * All state is the process's own, under one lock that is never held while waiting.  What the NIC reads
 * lies in the segment and follows vmmc_layout.h.
 */
#ifndef VMMC_PRIVATE_H
#define VMMC_PRIVATE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "endpoint.h"
#include "heap.h"
#include "vmmc.h"
#include "vmmc_layout.h"
#include "wait.h"

/* ---- state ---- */

enum { PAGE_ALLOCATED = 1, PAGE_FIRST = 2, PAGE_PINNED = 4 }; /* page.flags; FIRST: of an allocated run */
enum { NO_PAGE = 0 };                                          /* links hold a page's index + 1 */

struct page { /* of the heap */
  uint32_t users;        /* exports, redirections and commands that need it pinned: then it is in no list */
  uint32_t older, newer; /* pinned without users: neighbours in the list of those that may be unpinned */
  uint32_t flags;
  uint32_t run;          /* first and last page of an allocated or free run: its length in pages */
};

struct heap {
  struct page *page; /* VMMC_HEAP_PAGES of them, zero pages until touched */
  uint32_t top;      /* no run begins at or after this page */
};

struct utlb {
  uint64_t limit, pinned, in_use; /* pages */
  uint32_t oldest, newest;        /* ends of the list of pages that may be unpinned, index + 1 */
  uint64_t committed;             /* bit p: page p of the table is there */
};

struct operation { /* one command of the program's, or a transfer that takes several */
  struct vmmc_command command; /* whole: its pieces are cut from it */
  struct operation *next;      /* free, or queued with something left to post */
  uint32_t generation;         /* tells the transfers apart that use this place in turn */
  uint32_t outstanding;        /* commands posted and not yet answered */
  uint64_t posted;             /* bytes of a transfer that were posted */
  bool used;
  bool all_posted;
  bool finished;
  bool forgotten;              /* nobody waits for it */
  int32_t error;               /* the first errno that it met */
  uint64_t length;             /* answers: IMPORT: bytes exported; SEND, FETCH: bytes moved */
  uint32_t id, permissions;    /* IMPORT */
};

struct place { /* of the command queue */
  struct operation *operation; /* whose command is there, NULL: answered */
  uint64_t offset, length;     /* heap memory pinned for it */
};

enum { OPERATIONS = 1024 };

struct commands {
  struct operation operation[OPERATIONS];
  struct operation *free;
  struct operation *first, *last; /* with something left to post, in the order in which they came */
  struct place place[VMMC_COMMANDS];
  uint64_t head, tail; /* the oldest unanswered command; commands posted */
};

struct exported {
  bool used;
  uint64_t offset, length; /* in the heap, pinned */
  /* the posted redirection */
  uint64_t post;           /* its generation, 0: none */
  uint64_t redirect_offset, redirect_length, redirect_position;
  vmmc_handler *handler;
  void *context;
};

struct imported {
  bool used;
  uint64_t length;
};

struct notifier {
  uint64_t taken;                 /* every notification before it was taken */
  bool done[VMMC_NOTIFICATIONS];  /* of those after it */
  bool started;                   /* the thread runs */
  pthread_t thread;
  int32_t running;                /* export whose handler it is calling, -1: none */
  pthread_cond_t ran;             /* signalled when running becomes -1 */
  _Atomic uint32_t changed;       /* raised when this process changed what sleepers look at */
  _Atomic uint32_t asleep;        /* nobody reads it: every change wakes */
};

struct vmmc_endpoint {
  struct endpoint *endpoint;
  bool shared;             /* the one that the process's sockets use */
  uint32_t references;     /* shared: attaches without their detach */
  _Atomic uint32_t ended;  /* 1: it has; also a futex word */
  _Atomic uint32_t asleep; /* nobody reads it: ending always wakes */
  pthread_mutex_t lock;    /* all below; never held while asleep */
  struct heap heap;
  struct utlb utlb;
  struct commands commands;
  struct exported exported[VMMC_EXPORTS];
  struct imported imported[VMMC_EXPORTS];
  uint64_t posts; /* generations of redirections given so far */
  struct notifier notifier;
};

/* ---- vmmc.c ---- */

/* Begins a call: false with errno EBADF in a child of fork, ECONNRESET when the endpoint has ended,
 * ENETDOWN when its NIC has detached it, EINVAL for NULL. */
bool call_begin(struct vmmc_endpoint *v);

/* Sets errno; -1. */
int fail(int error);

/* Waits until ready(context), or the endpoint has ended, or the timeout; `words` are slept on, at most 3.
 * 0, or an errno.  The lock must not be held. */
int call_wait(struct vmmc_endpoint *v, const struct wait_word *words, int count, bool (*ready)(void *context),
              void *context, int timeout_ms);

/* ---- heap.c (see also heap.h); the lock is held ---- */
int heap_start(struct vmmc_endpoint *v); /* 0 or an errno */
void heap_stop(struct vmmc_endpoint *v);
/* The heap offset of [memory, + length); false: not all of it was handed out by vmmc_alloc. */
bool heap_offset(const struct vmmc_endpoint *v, const void *memory, uint64_t length, uint64_t *offset);

/* ---- utlb.c; the lock is held ---- */
void utlb_start(struct vmmc_endpoint *v);
/* Pins [offset, + length) for one more user, or as much of its beginning as the bound allows: bytes held,
 * whole pages but for the end.  *error: ENOMEM when the machine has no memory for it (0 bytes held). */
uint64_t utlb_hold(struct vmmc_endpoint *v, uint64_t offset, uint64_t length, int *error);
int utlb_hold_all(struct vmmc_endpoint *v, uint64_t offset, uint64_t length); /* 0 or ENOMEM, nothing held */
void utlb_release(struct vmmc_endpoint *v, uint64_t offset, uint64_t length);
void utlb_unpin(struct vmmc_endpoint *v, uint32_t page); /* pinned, without users */

/* ---- transfer.c; the lock is held ---- */
void commands_start(struct vmmc_endpoint *v);
void commands_advance(struct vmmc_endpoint *v); /* takes answers and posts what there is room for */
/* Takes up a command; NULL: too many are under way.  Answers are in it once it is finished. */
struct operation *operation_begin(struct vmmc_endpoint *v, const struct vmmc_command *command);
void operation_end(struct vmmc_endpoint *v, struct operation *o); /* finished and looked at */
void operation_forget(struct vmmc_endpoint *v, struct operation *o); /* ends by itself when finished */
/* Without the lock: runs a command to its end. 0 or an errno; *answer as the NIC gave it. */
int operation_run(struct vmmc_endpoint *v, const struct vmmc_command *command, int timeout_ms,
                  struct operation *answer);

/* ---- export.c; the lock is held ---- */
struct exported *export_find(struct vmmc_endpoint *v, int export_id); /* NULL: no such export */
void export_gone(struct vmmc_endpoint *v, uint32_t export_id); /* the NIC knows it no more */
void import_known(struct vmmc_endpoint *v, uint32_t import_id, bool used, uint64_t length);

/* ---- redirect.c; the lock is held ---- */
struct vmmc_redirected redirect_withdraw(struct vmmc_endpoint *v, uint32_t export_id);

/* ---- notify.c ---- */
void notify_start(struct vmmc_endpoint *v);
int notify_stop(struct vmmc_endpoint *v);                        /* 0 or EDEADLK; without the lock */
void notify_drop(struct vmmc_endpoint *v, uint32_t export_id);   /* those not taken; the lock is held */
/* What a wait for notifications, for arrivals, or for what this process may change sleeps on; how many words. */
int notify_words(struct vmmc_endpoint *v, struct wait_word words[2]);
void notify_changed(struct vmmc_endpoint *v); /* something else than the NIC changed what sleepers look at */

/* ---- parts of the segments ---- */
static inline struct vmmc_app_export *app_export(const struct vmmc_endpoint *v, uint32_t id) {
  return (struct vmmc_app_export *)(v->endpoint->app + VMMC_APP_EXPORTS) + id;
}
static inline const struct vmmc_nic_export *nic_export(const struct vmmc_endpoint *v, uint32_t id) {
  return (const struct vmmc_nic_export *)(v->endpoint->nic + VMMC_NIC_EXPORTS) + id;
}

/* Several threads, of sockets too, may count at once. */
#define COUNT_APP(v, name, n) \
  atomic_fetch_add_explicit(&app_header((v)->endpoint)->counters.name, (n), memory_order_relaxed)

#endif
