/*
 * readiness.h: sets of descriptors that a thread waits on, for epoll, poll and select.
 *
 * A set holds an item for each VMMC socket in it and a list of the items that may be ready.  The NIC enters
 * a socket whose readiness changed in the endpoint's event ring; whoever waits next takes the ring's
 * entries and puts the items concerned on their sets' lists.  So a wait costs what is ready, not what is
 * watched.  Kernel descriptors stay with the kernel's epoll instance (or the program's pollfd array).
 *
 * Locks, in this order: routes (which items belong to which file and set; the event ring), then a set's own
 * (its list), then that of a set nested in it.
 */
#ifndef PRELOAD_READINESS_H
#define PRELOAD_READINESS_H

#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>

#include "descriptors.h"
#include "fault.h"

/* One file in one set. */
struct item {
  struct instance *set;
  struct file *file;            /* not held: a file that ends takes its items along */
  int fd;                       /* number under which it was added: (file, fd) is what the kernel tells apart */
  uint32_t events;              /* as in epoll_ctl */
  epoll_data_t data;
  struct socket_edges edges;    /* EPOLLET: as last reported */
  bool fresh;                   /* added or modified since it was last reported */
  bool disabled;                /* EPOLLONESHOT: reported, until EPOLL_CTL_MOD */
  bool listed;                  /* on the set's list */
  struct item *list_next, *list_previous;
  struct item *file_next;       /* next membership of the same file */
  struct item *number_next;     /* next item of this set with the same fd; of unused ones: the next */
};

struct instance {
  pthread_mutex_t lock;            /* the list */
  struct item *first, *last;       /* items that may be ready */
  _Atomic uint32_t listed;         /* how many */
  struct item **numbers;           /* items by fd; guarded by routes */
  uint32_t numbers_size;
  _Atomic uint32_t members;        /* items in all */
  _Atomic int32_t kernel_members;  /* kernel descriptors that were added; closed ones may still count */
  _Atomic uint32_t turn;           /* which side is asked first, by turns */
  _Atomic bool filled;             /* the last answer left no room: it may have hidden what the kernel has */
  uint32_t group;                  /* wake group; from the first member on */
  bool has_group;
  struct file *file;               /* the epoll descriptor's file, not held; NULL: a poll or select */
  _Atomic uint32_t sleepers;       /* threads asleep in this set */
  _Atomic uint32_t kicks;          /* futex word of theirs for what this process itself changes */
  _Atomic uint64_t wakers;         /* event descriptors of those that sleep in the kernel's poll */
  _Atomic uint32_t kernel_waiters; /* threads in the kernel's epoll_wait: the set had no sockets yet */
  int kick_fd;                     /* event descriptor in the kernel's set to call them back, or -1 */
};

/* Something of this process changed a socket's readiness (connect, shutdown): look at it again. */
void readiness_changed(struct file *f);

/* The file is over: leaves every set; a set drops all its items. */
void readiness_forget(struct file *f);

/* A socket becomes the kernel's: its memberships end here, and begin in the kernel's sets. */
struct epoll_move;
struct epoll_move *readiness_leave(struct file *f);
void readiness_join_kernel(struct epoll_move *moved);

/* What is ready of a file, EPOLL* bits. */
uint32_t readiness_of(struct file *f);

/* ---- for epoll.c and poll.c ---- */

/* A mask as the program gives it, in the kernel's size: what calls by number pass has no more. */
static inline bool take_mask(sigset_t *mask, const sigset_t *given) {
  sigemptyset(mask);
  return fault_copy(mask, given, _NSIG / 8);
}

struct instance *set_new(void); /* NULL: ENOMEM */
void set_free(struct instance *set); /* without items */

void routes_take(void);
void routes_release(void);

/* With routes held. */
struct item *set_find(struct instance *set, int fd, struct file *f);
int set_add(struct instance *set, int fd, struct file *f, const struct epoll_event *event); /* 0 or -errno */
void set_remove(struct item *item);
void set_remove_all(struct instance *set);
void set_raise(struct item *item, bool kick); /* put on the list; kick: and wake the set's sleepers */

/* Takes the event ring's entries.  True when the set's list is not empty then. */
bool set_look(struct instance *set);
/* A cheap look for a poller: may there be anything? */
bool set_stirs(struct instance *set);
/* Reports up to `room` ready items; with routes not held.  -1, errno: EFAULT before there was one. */
int set_harvest(struct instance *set, struct epoll_event *events, int room);
void set_clear_list(struct instance *set);

/* This process changed what the set's sleepers sleep on: they look at it again. */
void set_kick(struct instance *set);

enum { SET_SLEEP_OURS = 2 }; /* descriptors that set_sleep adds to the caller's */

/* Sleeps until an item may be ready, one of the `count` kernel descriptors is (kernel has room for
 * SET_SLEEP_OURS more; NULL: none), the deadline is over, a handler ran since `since`, or the set was kicked since `kicks`
 * was read: before the caller decided what to sleep on. */
void set_sleep(struct instance *set, struct pollfd *kernel, nfds_t count, uint32_t kicks, uint64_t deadline_ns,
               struct wait_signals since);

/* Called by signal handlers' wrapper: a thread that is about to sleep in the kernel's poll does not. */
void readiness_signal(void);

void readiness_fork_prepare(void);
void readiness_fork_parent(void);
void readiness_fork_child(void);

#endif
