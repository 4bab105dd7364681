/* descriptors.c: the table from descriptor numbers to VMMC sockets, and the calls that duplicate and
 * close descriptors.  See descriptors.h. */
#include "descriptors.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "names.h"
#include "process.h"
#include "readiness.h"
#include "real.h"
#include "setup.h"
#include "sys.h"

_Atomic(descriptor_entry *) descriptor_table[DESCRIPTOR_CHUNKS];
struct file file_forked = {.kind = FILE_FORKED};

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER; /* chunks, unused files, the base socket */
static struct file *unused_files;
static _Atomic uint32_t open_sockets;
static int base_fd = -1;                    /* the listening socket that placeholders duplicate */
static bool base_unsure;                    /* a fork may have closed it */
static _Atomic int32_t owner_pid;           /* whose table this is */
static const char base_name[] = "vmmc-placeholder."; /* how the base socket's name begins, see base_bind */
static char base_directory[PATH_MAX];               /* where it has that name for a moment; empty: nowhere */

/* ---- files ---- */

struct file *file_new(enum file_kind kind, struct vsocket *socket, struct instance *set) {
  critical_lock(&table_lock);
  struct file *f = unused_files;
  if (f) {
    unused_files = f->next_free;
  } else {
    /* A batch at a time; never given back, see struct file. */
    enum { BATCH = 32 };
    struct file *batch = calloc(BATCH, sizeof *batch);
    for (int i = 1; batch && i < BATCH; i++) {
      batch[i].next_free = unused_files;
      unused_files = &batch[i];
    }
    f = batch;
  }
  critical_unlock(&table_lock);
  if (!f) {
    errno = ENOMEM;
    return NULL;
  }
  f->kind = kind;
  f->socket = socket;
  f->set = set;
  f->items = NULL;
  setup_forget_options(f); /* of its last use: not at its end, since signal handlers may close, and not free */
  f->next_free = NULL;
  atomic_store_explicit(&f->nonblocking, 0, memory_order_relaxed);
  atomic_store_explicit(&f->appends, 0, memory_order_relaxed);
  if (socket) {
    atomic_store_explicit(&socket->readiness, f, memory_order_release);
    atomic_fetch_add_explicit(&open_sockets, 1, memory_order_relaxed);
    process_watch_forks();
  }
  atomic_store_explicit(&f->holds, 1, memory_order_release); /* whoever holds it sees it filled in */
  return f;
}

void file_hold(struct file *f) {
  if (f != &file_forked) atomic_fetch_add_explicit(&f->holds, 1, memory_order_relaxed);
}

bool file_try_hold(struct file *f) {
  uint32_t holds = atomic_load_explicit(&f->holds, memory_order_relaxed);
  while (holds && !atomic_compare_exchange_weak_explicit(&f->holds, &holds, holds + 1, memory_order_acquire,
                                                         memory_order_relaxed)) {
  }
  return holds != 0;
}

void file_put(struct file *f) {
  /* acq_rel: whoever puts the last hold sees what all others did with the file */
  if (f == &file_forked || atomic_fetch_sub_explicit(&f->holds, 1, memory_order_acq_rel) != 1) return;
  int error = errno;
  readiness_forget(f);
  if (f->kind == FILE_SOCKET) {
    atomic_fetch_sub_explicit(&open_sockets, 1, memory_order_relaxed);
    socket_close(f->socket);
    socket_release(f->socket);
  }
  critical_lock(&table_lock);
  f->next_free = unused_files;
  unused_files = f;
  critical_unlock(&table_lock);
  errno = error;
}

void file_put_held(void *f) { file_put(f); }

uint32_t descriptor_sockets(void) { return atomic_load_explicit(&open_sockets, memory_order_relaxed); }

/* ---- the table ---- */

static descriptor_entry *entry_of(int fd) {
  if ((unsigned)fd >= DESCRIPTOR_CHUNK * DESCRIPTOR_CHUNKS) return NULL;
  descriptor_entry *chunk = atomic_load_explicit(&descriptor_table[fd / DESCRIPTOR_CHUNK], memory_order_acquire);
  return chunk ? &chunk[fd % DESCRIPTOR_CHUNK] : NULL;
}

struct file *descriptor_hold(int fd) {
  if (__builtin_expect(!process_is_ours(), 0)) process_forked();
  for (;;) {
    struct file *f = descriptor_peek(fd);
    if (!f || f == &file_forked) return f;
    if (!file_try_hold(f)) continue; /* closed between the two looks: the entry has changed */
    if (descriptor_peek(fd) == f) return f;
    file_put(f); /* the number was given to another file meanwhile */
  }
}

int descriptor_install(int fd, struct file *f) {
  if ((unsigned)fd >= DESCRIPTOR_CHUNK * DESCRIPTOR_CHUNKS) {
    errno = EMFILE;
    return -1;
  }
  _Atomic(descriptor_entry *) *chunk = &descriptor_table[fd / DESCRIPTOR_CHUNK];
  if (!atomic_load_explicit(chunk, memory_order_acquire)) {
    descriptor_entry *fresh = calloc(DESCRIPTOR_CHUNK, sizeof *fresh), *none = NULL;
    if (!fresh) return -1;
    if (!atomic_compare_exchange_strong(chunk, &none, fresh)) free((void *)fresh);
  }
  struct file *before = atomic_exchange_explicit(entry_of(fd), f, memory_order_acq_rel);
  if (__builtin_expect(fd < STANDARD_STREAMS, 0)) streams_follow(fd);
  if (before) file_put(before);
  return 0;
}

void descriptor_forget(int fd) {
  descriptor_entry *entry = entry_of(fd);
  if (!entry || descriptor_is_borrowed()) return;
  struct file *before = atomic_exchange_explicit(entry, NULL, memory_order_acq_rel);
  if (before && __builtin_expect(fd < STANDARD_STREAMS, 0)) streams_follow(fd);
  if (before) file_put(before);
}

void descriptor_walk(unsigned first, unsigned last, void (*visit)(int fd, struct file *f, void *context),
                     void *context) {
  for (unsigned c = first / DESCRIPTOR_CHUNK; c < DESCRIPTOR_CHUNKS && c <= last / DESCRIPTOR_CHUNK; c++) {
    if (!atomic_load_explicit(&descriptor_table[c], memory_order_acquire)) continue;
    for (unsigned i = 0; i < DESCRIPTOR_CHUNK; i++) {
      unsigned fd = c * DESCRIPTOR_CHUNK + i;
      struct file *f = descriptor_peek((int)fd);
      if (f && fd >= first && fd <= last) visit((int)fd, f, context);
    }
  }
}

bool descriptor_is_borrowed(void) {
  if (!process_is_ours()) process_forked();
  return (int32_t)REAL(syscall)(SYS_getpid) != atomic_load_explicit(&owner_pid, memory_order_relaxed);
}

/* ---- placeholders ---- */

bool descriptor_is_placeholder(int fd) {
  struct sockaddr_un name;
  socklen_t length = sizeof name;
  if (REAL(getsockname)(fd, (struct sockaddr *)&name, &length) < 0 || name.sun_family != AF_UNIX) return false;
  if (length <= offsetof(struct sockaddr_un, sun_path)) return false;
  size_t count = length - offsetof(struct sockaddr_un, sun_path);
  if (count > sizeof name.sun_path) count = sizeof name.sun_path;
  if (!name.sun_path[0]) return count >= sizeof base_name && !memcmp(name.sun_path + 1, base_name, sizeof base_name - 1);
  const char *directory = memrchr(name.sun_path, '/', count);
  if (!directory) return false;
  count -= (size_t)(directory + 1 - name.sun_path);
  return count >= sizeof base_name - 1 && !memcmp(directory + 1, base_name, sizeof base_name - 1);
}

/*
 * Names the base socket, which has to have a name to listen, where nobody reaches it: in the cluster's directory,
 * which only its user enters, and from where the name goes at once; the kernel goes on telling it.  Where that
 * cannot be had (a full disk, no /proc) the same name is an abstract one, to which anybody may connect; no call of
 * the program's sees that.  The pid is for people who look at /proc/net/unix; the random part keeps pid namespaces
 * apart.  thread-self: the first thread may have ended, and /proc/self is its.
 */
static int base_bind(int fd) {
  uint32_t random = 0;
  /* Not the C library's: that is a cancellation point, and we have a lock. */
  if (sys_call(SYS_getrandom, (long)&random, sizeof random, 0, 0, 0, 0) < 0) random = (uint32_t)vmmc_now_ns();
  char base[sizeof base_name + 32];
  snprintf(base, sizeof base, "%s%d.%08x", base_name, getpid(), random);
  struct sockaddr_un name = {.sun_family = AF_UNIX};
  int directory = (int)sys_call(SYS_openat, AT_FDCWD, (long)base_directory, O_PATH | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
  if (directory >= 0) {
    /* By the descriptor: the directory's own path may be as long as an address may be. */
    snprintf(name.sun_path, sizeof name.sun_path, "/proc/thread-self/fd/%d/%s", directory, base);
    int bound = REAL(bind)(fd, (struct sockaddr *)&name, sizeof name);
    if (bound == 0) sys_call(SYS_unlinkat, directory, (long)base, 0, 0, 0, 0);
    sys_close(directory);
    if (bound == 0) return 0;
  }
  memset(name.sun_path, 0, sizeof name.sun_path);
  int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "%s", base);
  return REAL(bind)(fd, (struct sockaddr *)&name, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length));
}

void descriptor_begin(const char *socket) {
  const char *end = strrchr(socket, '/');
  snprintf(base_directory, sizeof base_directory, "%.*s", end ? (int)(end - socket) : 0, socket);
}

static int base_open(void) {
  if (base_unsure && (!endpoint_descriptor_is_private(base_fd) || !descriptor_is_placeholder(base_fd))) base_fd = -1;
  base_unsure = false;
  if (base_fd >= 0) return base_fd;
  int fd = REAL(socket)(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  if (base_bind(fd) < 0 || REAL(listen)(fd, 0) < 0) {
    int error = errno;
    sys_close(fd);
    errno = error;
    return -1;
  }
  int private = endpoint_private_descriptor(fd);
  if (private < 0) {
    errno = -private;
    return -1;
  }
  return base_fd = private;
}

int descriptor_placeholder(bool close_on_exec) {
  critical_lock(&table_lock);
  int base = base_open();
  critical_unlock(&table_lock);
  if (base < 0) return -1;
  return REAL(fcntl)(base, close_on_exec ? F_DUPFD_CLOEXEC : F_DUPFD, 0);
}

/* ---- fork ---- */

__attribute__((constructor)) static void owner_begin(void) {
  atomic_store_explicit(&owner_pid, getpid(), memory_order_relaxed);
}

void descriptor_fork_prepare(void) { pthread_mutex_lock(&table_lock); }
void descriptor_fork_parent(void) { pthread_mutex_unlock(&table_lock); }

static void close_to_child(int fd, struct file *f, void *context) {
  (void)context;
  /* The files stay as they are, leaked: their locks may have been held, their sockets are the parent's. */
  atomic_store_explicit(entry_of(fd), f->kind == FILE_EPOLL ? NULL : &file_forked, memory_order_release);
}

void descriptor_fork_child(void) {
  table_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
  streams_fork_child();
  atomic_store_explicit(&owner_pid, (int32_t)REAL(syscall)(SYS_getpid), memory_order_relaxed);
  atomic_store_explicit(&open_sockets, 0, memory_order_relaxed);
  descriptor_walk(0, UINT32_MAX, close_to_child, NULL);
  base_unsure = true; /* the endpoint's own fork handler closes private descriptors, perhaps after this one */
}

int descriptor_refuse(int fd) {
  static _Atomic bool said;
  if (process_diagnostics && !atomic_exchange(&said, true))
    process_say("descriptor %d was a VMMC socket of the process that forked this one (now parent %d): a fork leaves "
                "user-level sockets to the parent, so using it here fails with EBADF; open sockets after the fork",
                fd, getppid());
  errno = EBADF;
  return -1;
}

/* ---- duplicating and closing: the interposed calls ---- */

INTERPOSE int close(int fd) {
  if (!descriptor_peek(fd)) {
    if (__builtin_expect(process_on_node, 0) && fd > 2 && endpoint_descriptor_is_private(fd) &&
        !descriptor_is_borrowed()) {
      errno = EBADF; /* to the program that number is not open */
      return -1;
    }
    return REAL(close)(fd);
  }
  if (descriptor_is_borrowed()) return REAL(close)(fd);
  pthread_testcancel(); /* here, and not once the entry is gone */
  /* The entry goes first: once the kernel has the number back, another thread may be given it. */
  descriptor_entry *entry = entry_of(fd);
  struct file *f = atomic_exchange_explicit(entry, NULL, memory_order_acq_rel);
  if (f && __builtin_expect(fd < STANDARD_STREAMS, 0)) streams_follow(fd);
  int error = sys_close(fd);
  if (f) file_put(f);
  if (!error) return 0;
  errno = -error;
  return -1;
}
int __close(int fd) __attribute__((alias("close"), visibility("default")));

/* Installs at `fresh` what `f` says, after the kernel made that duplicate. Takes over the hold. */
static int duplicated(int fresh, struct file *f) {
  if (fresh >= 0 && f && descriptor_install(fresh, f) == 0) return fresh;
  int error = errno;
  if (f) file_put(f);
  if (fresh >= 0 && f) {
    sys_close(fresh);
    fresh = -1;
  }
  errno = error;
  return fresh;
}

INTERPOSE int dup(int fd) {
  struct file *f = file_get(fd);
  if (!f) return descriptor_fresh(REAL(dup)(fd));
  if (f == &file_forked) return descriptor_refuse(fd);
  int fresh = REAL(dup)(fd);
  if (descriptor_is_borrowed()) {
    file_put(f);
    return fresh;
  }
  return duplicated(fresh, f);
}

static int dup_onto(int from, int to, int flags, bool is_dup2) {
  struct file *f = file_get(from);
  if (f == &file_forked) return descriptor_refuse(from);
  struct file *before = descriptor_peek(to);
  if (__builtin_expect(process_on_node, 0) && to > 2 && endpoint_descriptor_is_private(to) &&
      !descriptor_is_borrowed()) {
    if (f) file_put(f);
    errno = EBUSY; /* as the kernel says where a number is being taken; ours are numbered out of the way */
    return -1;
  }
  int result = is_dup2 ? REAL(dup2)(from, to) : REAL(dup3)(from, to, flags);
  if (!f && !before) return result;
  if (result < 0 || from == to || descriptor_is_borrowed()) {
    if (f) file_put(f);
    return result;
  }
  if (f) return duplicated(result, f);
  descriptor_forget(to);
  return result;
}
INTERPOSE int dup2(int from, int to) { return dup_onto(from, to, 0, true); }
INTERPOSE int dup3(int from, int to, int flags) { return dup_onto(from, to, flags, false); }
int __dup2(int from, int to) __attribute__((alias("dup2"), nothrow, leaf, visibility("default")));

static int do_fcntl(__typeof__(&fcntl) real, int fd, int command, void *argument) {
  bool duplicates = command == F_DUPFD || command == F_DUPFD_CLOEXEC;
  struct file *f = file_get(fd);
  if (!f) {
    int result = real(fd, command, argument);
    return duplicates ? descriptor_fresh(result) : result;
  }
  if (f == &file_forked) return descriptor_refuse(fd);
  int result;
  if (duplicates) {
    result = real(fd, command, argument);
    if (!descriptor_is_borrowed()) return duplicated(result, f);
  } else if (f->kind == FILE_SOCKET && command == F_GETFL) {
    result = O_RDWR | (atomic_load_explicit(&f->nonblocking, memory_order_relaxed) ? O_NONBLOCK : 0) |
             (atomic_load_explicit(&f->appends, memory_order_relaxed) ? O_APPEND : 0);
  } else if (f->kind == FILE_SOCKET && command == F_SETFL) {
    int flags = (int)(intptr_t)argument;
    result = 0;
    if (flags & (O_ASYNC | O_DIRECT)) { /* no SIGIO from here: better refused than never sent */
      errno = EINVAL;
      result = -1;
    } else {
      atomic_store_explicit(&f->nonblocking, (flags & O_NONBLOCK) != 0, memory_order_relaxed);
      atomic_store_explicit(&f->appends, (flags & O_APPEND) != 0, memory_order_relaxed);
    }
  } else {
    result = real(fd, command, argument);
  }
  file_put(f);
  return result;
}

INTERPOSE int fcntl(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void *argument = va_arg(arguments, void *);
  va_end(arguments);
  return do_fcntl(real_known ? real_calls.fcntl : (real_resolve(), real_calls.fcntl), fd, command, argument);
}
INTERPOSE int fcntl64(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void *argument = va_arg(arguments, void *);
  va_end(arguments);
  return do_fcntl(real_known ? real_calls.fcntl64 : (real_resolve(), real_calls.fcntl64), fd, command, argument);
}
int __fcntl(int fd, int command, ...) __attribute__((alias("fcntl"), visibility("default")));

static void forget_one(int fd, struct file *f, void *context) {
  (void)f, (void)context;
  descriptor_forget(fd);
}

static int range_call(unsigned first, unsigned last, int flags) {
  if (REAL(close_range)) return REAL(close_range)(first, last, flags);
  return (int)REAL(syscall)(SYS_close_range, first, last, flags);
}

void descriptors_open(void (*visit)(int fd, void *context), void *context) {
  int directory = (int)REAL(syscall)(SYS_openat, AT_FDCWD, "/proc/thread-self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return;
  char buffer[4096];
  for (long length; (length = REAL(syscall)(SYS_getdents64, directory, buffer, sizeof buffer)) > 0;) {
    for (long at = 0; at < length;) {
      struct { /* linux_dirent64 */
        uint64_t inode;
        int64_t offset;
        uint16_t size;
        uint8_t type;
        char name[];
      } *entry = (void *)(buffer + at);
      at += entry->size;
      int fd = atoi(entry->name);
      if (entry->name[0] != '.' && fd != directory) visit(fd, context);
    }
  }
  REAL(syscall)(SYS_close, directory);
}

/* The library's own descriptors in [first, last], ascending. */
struct private_descriptors {
  unsigned first, last;
  int count;
  unsigned found[VMMC_WAKERS + 16];
};

static void note_private(int number, void *context) {
  struct private_descriptors *p = context;
  unsigned fd = (unsigned)number;
  if (fd < p->first || fd > p->last || p->count == (int)(sizeof p->found / sizeof *p->found) ||
      !endpoint_descriptor_is_private(number))
    return;
  int place = p->count++;
  for (; place > 0 && p->found[place - 1] > fd; place--) p->found[place] = p->found[place - 1];
  p->found[place] = fd;
}

/* Spares the library's own descriptors: the program does not know that it has them. */
static int close_between(unsigned first, unsigned last, int flags) {
  if (!process_on_node || (flags & ~CLOSE_RANGE_UNSHARE) || first > last || descriptor_is_borrowed())
    return range_call(first, last, flags);
  descriptor_walk(first, last, forget_one, NULL);
  struct private_descriptors private = { first, last, 0, { 0 } };
  descriptors_open(note_private, &private);
  const unsigned *found = private.found;
  int count = private.count;
  for (int i = 0; i < count; first = found[i++] + 1)
    if (found[i] > first && range_call(first, found[i] - 1, flags) < 0) return -1;
  return first <= last && (count == 0 || first > found[count - 1]) ? range_call(first, last, flags) : 0;
}

INTERPOSE int close_range(unsigned first, unsigned last, int flags) { return close_between(first, last, flags); }
INTERPOSE void closefrom(int first) { close_between(first < 0 ? 0 : (unsigned)first, UINT32_MAX, 0); }

/* ---- calls that hand out new numbers: what we knew of a number that libc closed is over ---- */

#define FRESH(result) return descriptor_fresh(result)
#define MODE(flags)                                                                        \
  ({                                                                                       \
    va_list arguments;                                                                     \
    va_start(arguments, flags);                                                            \
    mode_t mode = (flags) & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0;       \
    va_end(arguments);                                                                     \
    mode;                                                                                  \
  })
INTERPOSE int open(const char *path, int flags, ...) {
  FRESH(REAL(open)(names_opened(path, flags), flags, MODE(flags)));
}
INTERPOSE int open64(const char *path, int flags, ...) {
  FRESH(REAL(open64)(names_opened(path, flags), flags, MODE(flags)));
}
INTERPOSE int openat(int at, const char *path, int flags, ...) {
  FRESH(REAL(openat)(at, names_opened(path, flags), flags, MODE(flags)));
}
INTERPOSE int openat64(int at, const char *path, int flags, ...) {
  FRESH(REAL(openat64)(at, names_opened(path, flags), flags, MODE(flags)));
}
/* Of fortified programs. */
INTERPOSE int __open_2(const char *path, int flags) { FRESH(REAL(__open_2)(names_opened(path, flags), flags)); }
INTERPOSE int __open64_2(const char *path, int flags) { FRESH(REAL(__open64_2)(names_opened(path, flags), flags)); }
INTERPOSE int __openat_2(int at, const char *path, int flags) {
  FRESH(REAL(__openat_2)(at, names_opened(path, flags), flags));
}
INTERPOSE int __openat64_2(int at, const char *path, int flags) {
  FRESH(REAL(__openat64_2)(at, names_opened(path, flags), flags));
}
INTERPOSE int creat(const char *path, mode_t mode) { FRESH(REAL(creat)(path, mode)); }
INTERPOSE int creat64(const char *path, mode_t mode) { FRESH(REAL(creat64)(path, mode)); }
INTERPOSE int eventfd(unsigned count, int flags) { FRESH(REAL(eventfd)(count, flags)); }
INTERPOSE int timerfd_create(clockid_t clock, int flags) { FRESH(REAL(timerfd_create)(clock, flags)); }
INTERPOSE int signalfd(int fd, const sigset_t *mask, int flags) {
  int result = REAL(signalfd)(fd, mask, flags);
  return fd == -1 ? descriptor_fresh(result) : result;
}
INTERPOSE int inotify_init(void) { FRESH(REAL(inotify_init)()); }
INTERPOSE int inotify_init1(int flags) { FRESH(REAL(inotify_init1)(flags)); }
INTERPOSE int memfd_create(const char *name, unsigned flags) { FRESH(REAL(memfd_create)(name, flags)); }
INTERPOSE int pipe2(int pair[2], int flags) {
  int result = REAL(pipe2)(pair, flags);
  if (result == 0) descriptor_fresh(pair[0]), descriptor_fresh(pair[1]);
  return result;
}
INTERPOSE int pipe(int pair[2]) {
  int result = REAL(pipe)(pair);
  if (result == 0) descriptor_fresh(pair[0]), descriptor_fresh(pair[1]);
  return result;
}
static FILE *fresh_stream(FILE *stream) {
  if (stream) descriptor_fresh(fileno(stream));
  return stream;
}
/* Who writes has the machine's file: see names_opened. */
static const char *streamed(const char *path, const char *mode) {
  return mode[0] == 'r' && !strchr(mode, '+') ? names_file(path) : path;
}
INTERPOSE FILE *fopen(const char *path, const char *mode) {
  return fresh_stream(REAL(fopen)(streamed(path, mode), mode));
}
INTERPOSE FILE *fopen64(const char *path, const char *mode) {
  return fresh_stream(REAL(fopen64)(streamed(path, mode), mode));
}
