/*
 * descriptors.h: which descriptors of this process are VMMC sockets.
 *
 * Each VMMC socket holds a kernel descriptor, its placeholder: a duplicate of one socket per process that
 * listens where nobody can connect to it (as a rule: see base_bind), named vmmc-placeholder.<pid>.<random>.
 * So the number is taken, fstat says "socket", FD_CLOEXEC is the kernel's, it polls as nothing, and a program
 * that inherits one recognises it by the name.  O_NONBLOCK is ours: the kernel would share it among all
 * placeholders.
 */
#ifndef PRELOAD_DESCRIPTORS_H
#define PRELOAD_DESCRIPTORS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "socket.h"

struct instance; /* readiness.h */
struct item;

enum file_kind { FILE_SOCKET, FILE_EPOLL, FILE_FORKED };

/* An open file: what the descriptors that dup made of each other share.  The memory of one is only ever
 * used for another, so that a thread may look at one that was just closed. */
struct file {
  _Atomic uint32_t holds;        /* descriptors, and calls under way; the last one closes it; 0: not in use */
  enum file_kind kind;           /* never changes while in use */
  _Atomic uint32_t nonblocking;  /* O_NONBLOCK */
  _Atomic uint32_t appends;      /* O_APPEND: given back, and nothing else */
  struct vsocket *socket;        /* FILE_SOCKET */
  struct instance *set;          /* FILE_EPOLL */
  struct item *items;            /* memberships in sets; guarded by readiness.c's routes lock */
  struct option *options;        /* setsockopt calls, newest first, to repeat on a kernel socket (setup.c) */
  struct file *next_free;        /* list of unused ones */
};

/* Stands for a socket of the process that forked us: closing it works, using it does not. */
extern struct file file_forked;

enum { DESCRIPTOR_CHUNK = 1024, DESCRIPTOR_CHUNKS = 1024 };
typedef _Atomic(struct file *) descriptor_entry;
extern _Atomic(descriptor_entry *) descriptor_table[DESCRIPTOR_CHUNKS];

/* The file at a number without holding it: NULL for the kernel's descriptors. */
static inline struct file *descriptor_peek(int fd) {
  if ((unsigned)fd >= DESCRIPTOR_CHUNK * DESCRIPTOR_CHUNKS) return NULL;
  descriptor_entry *chunk = atomic_load_explicit(&descriptor_table[fd / DESCRIPTOR_CHUNK], memory_order_acquire);
  return chunk ? atomic_load_explicit(&chunk[fd % DESCRIPTOR_CHUNK], memory_order_acquire) : NULL;
}

struct file *descriptor_hold(int fd); /* slow half of the next two */

/* The file at a number, held, to be given back with file_put; &file_forked; or NULL: the kernel's. */
static inline struct file *file_get(int fd) {
  return __builtin_expect(descriptor_peek(fd) == NULL, 1) ? NULL : descriptor_hold(fd);
}

void file_put(struct file *f); /* keeps errno */

/* The same for calls that know sockets only: an epoll descriptor is the kernel's to them. */
static inline struct file *socket_get(int fd) {
  struct file *f = __builtin_expect(descriptor_peek(fd) == NULL, 0) ? NULL : descriptor_hold(fd);
  if (__builtin_expect(f == NULL || f->kind != FILE_EPOLL, 1)) return f;
  file_put(f);
  return NULL;
}

void file_hold(struct file *f);
bool file_try_hold(struct file *f); /* not when nobody else holds it any more */

/* Runs undo(context) at the end of the block, also when the thread is cancelled in it or leaves it by longjmp. */
static inline void undo_at_end(struct wait_undo *record) {
  wait_undo_pop(record);
  record->undo(record->context);
}
#define AT_END(record, undo, context)                         \
  struct wait_undo record __attribute__((cleanup(undo_at_end))); \
  wait_undo_push(&record, undo, context)

/* Gives a file back likewise. */
void file_put_held(void *f);
static inline void holding_end(struct wait_undo *record) {
  wait_undo_pop(record);
  file_put(record->context);
}
#define HOLDING(f)                                                \
  struct wait_undo held_ __attribute__((cleanup(holding_end)));    \
  wait_undo_push(&held_, file_put_held, f)

/* A new file with one hold, or NULL: ENOMEM. Takes over the reference to the socket. */
struct file *file_new(enum file_kind kind, struct vsocket *socket, struct instance *set);

/* A placeholder for a new socket: the number, or -1 with errno. */
int descriptor_placeholder(bool close_on_exec);
void descriptor_begin(const char *socket); /* the daemon's, in whose directory placeholders have their name */
bool descriptor_is_placeholder(int fd); /* by its name: one inherited counts too */

/* Puts a file at a number that the kernel just gave us; what stood there before is closed.
 * Takes over one hold. 0, or -1 with errno. */
int descriptor_install(int fd, struct file *f);

/* The number is closed, or the kernel has just handed it out: what we knew of it is over. */
void descriptor_forget(int fd);
static inline int descriptor_fresh(int fd) {
  if (__builtin_expect(descriptor_peek(fd) != NULL, 0)) descriptor_forget(fd);
  return fd;
}

/* Calls `visit` for each number that is open, as the kernel says; no memory is taken, nor anybody's lock. */
void descriptors_open(void (*visit)(int fd, void *context), void *context);
/* Calls `visit` for each number in [first, last] that is not the kernel's. */
void descriptor_walk(unsigned first, unsigned last, void (*visit)(int fd, struct file *f, void *context),
                     void *context);

uint32_t descriptor_sockets(void); /* sockets that are open now */

/* True in a child that runs in this process's memory (vfork, posix_spawn): its descriptors are its own,
 * the table is its parent's.  Costs a getpid: only for calls that would change the table. */
bool descriptor_is_borrowed(void);

/* A standard number is another file's now: so is its stream (streams.c). */
enum { STANDARD_STREAMS = 3 };
void streams_follow(int fd);
void streams_fork_child(void);

void descriptor_fork_prepare(void);
void descriptor_fork_parent(void);
void descriptor_fork_child(void);

/* Reports the use of a socket that a fork closed: errno = EBADF, -1. */
int descriptor_refuse(int fd);

#endif
