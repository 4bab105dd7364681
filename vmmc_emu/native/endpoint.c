/*
 * endpoint.c: attaching a process to its node, and telling the NIC where to look.
 *
 * A process attaches once, on its first stream socket, and stays attached until it ends: the daemon
 * holds the other end of a socket that the kernel closes for us at exit and at exec.  The segments are
 * not inherited across fork; a page that the kernel wipes in a child tells one that has none.
 */
#include "endpoint.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/un.h>

#include "sys.h"
#include "vmmc_attach.h"
#include "vmmc_idle.h"
#include "wait.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

enum {
  PRIVATE_FROM = 8192, /* where private descriptors are numbered: the kernel's table grows with the number */
  PRIVATE_SPAN = 256,  /* or, under a lower limit, this far below it */
  PRIVATE_END = 65536, /* none is numbered higher */
};

static _Atomic(struct endpoint *) current;
static pthread_mutex_t attach_lock = PTHREAD_MUTEX_INITIALIZER;
static void (*fork_hook)(void);

/* 1 in the process that attached; the kernel zeroes it in a child (MADV_WIPEONFORK). */
static _Atomic unsigned char unattached;
static _Atomic(_Atomic unsigned char *) mark = &unattached;

/* The mark's page is made once (acquire: its zero is seen), and its byte is a flag of this process alone:
 * what goes with it is ordered by `current`. */
static _Atomic unsigned char *mark_of(void) { return atomic_load_explicit(&mark, memory_order_acquire); }

/* A bit for each private descriptor, by its number. */
static _Atomic uint64_t private_bits[PRIVATE_END / 64];

/* ---- private descriptors --------------------------------------------------------------------- */

int endpoint_private_descriptor(int fd) {
  struct rlimit limit;
  int from = PRIVATE_FROM;
  if (fd < 0) return -EBADF;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < PRIVATE_FROM + PRIVATE_SPAN)
    from = limit.rlim_cur > 2 * PRIVATE_SPAN ? (int)limit.rlim_cur - PRIVATE_SPAN : (int)limit.rlim_cur / 2;
  int high = sys_fcntl(fd, F_DUPFD_CLOEXEC, from);
  /* The numbers up there are taken: any number is better than none. */
  if (high < 0 || high >= PRIVATE_END) {
    if (high >= 0) sys_close(high);
    high = sys_fcntl(fd, F_DUPFD_CLOEXEC, 3);
  }
  sys_close(fd);
  if (high >= PRIVATE_END) {
    sys_close(high);
    high = -EMFILE;
  }
  if (high >= 0) atomic_fetch_or(&private_bits[high / 64], 1ull << (high % 64));
  return high;
}

bool endpoint_descriptor_is_private(int fd) {
  return fd >= 0 && fd < PRIVATE_END &&
         atomic_load_explicit(&private_bits[fd / 64], memory_order_relaxed) >> (fd % 64) & 1;
}

void endpoint_private_close(int fd) {
  if (!endpoint_descriptor_is_private(fd)) return;
  /* Forgotten first: once the kernel has closed it, the number may be the program's. */
  atomic_fetch_and(&private_bits[fd / 64], ~(1ull << (fd % 64)));
  sys_close(fd);
}

/* ---- committed memory ------------------------------------------------------------------------ */

int endpoint_commit(const void *start, uint64_t length, bool writable) {
  uintptr_t from = (uintptr_t)start & ~(uintptr_t)(VMMC_PAGE - 1);
  uintptr_t to = ((uintptr_t)start + length + VMMC_PAGE - 1) & ~(uintptr_t)(VMMC_PAGE - 1);
  int saved = errno, result = 0;
  while (madvise((void *)from, to - from, writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) < 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno == EINVAL) { /* before Linux 5.14: touch, without changing what others store there */
      for (uintptr_t page = from; page < to; page += VMMC_PAGE) {
        if (writable)
          atomic_fetch_or_explicit((_Atomic unsigned char *)page, 0, memory_order_relaxed);
        else
          (void)*(volatile const unsigned char *)page;
      }
    } else { /* EFAULT: the store would have been a SIGBUS, so /dev/shm is full; ENOMEM alike */
      result = -ENOBUFS;
    }
    break;
  }
  errno = saved;
  return result;
}

/* ---- attach ----------------------------------------------------------------------------------- */

enum { ATTACH_TRIES = 8 };

static int talk_to_daemon(const char *path) {
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  if (strlen(path) >= sizeof address.sun_path) return -ENAMETOOLONG;
  strcpy(address.sun_path, path);
  int fd = sys_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (fd < 0) return fd;
  int error = sys_connect(fd, (struct sockaddr *)&address, sizeof address);
  if (error < 0) {
    sys_close(fd);
    return error;
  }
  return fd;
}

static int say(int fd, uint32_t kind, uint32_t waker, int descriptor) {
  struct vmmc_attach_request request = { VMMC_MAGIC, VMMC_LAYOUT_VERSION, kind, waker };
  struct iovec vector = { &request, sizeof request };
  union {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
  } ancillary = { { 0 } };
  struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1 };
  if (descriptor >= 0) {
    message.msg_control = ancillary.bytes;
    message.msg_controllen = sizeof ancillary.bytes;
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &descriptor, sizeof descriptor);
  }
  ssize_t n;
  do n = sys_sendmsg(fd, &message, MSG_NOSIGNAL);
  while (n == -EINTR);
  return n < 0 ? (int)n : 0;
}

/* What the daemon last said of room in /dev/shm that it does not have.  attach_default reads it. */
static _Atomic uint64_t needed_bytes, free_bytes;

/* Takes the daemon's answer, and its three descriptors.  0 or -errno with none held. */
static int hear(int fd, struct vmmc_attach_reply *reply, int descriptor[3]) {
  struct iovec vector = { reply, sizeof *reply };
  union {
    char bytes[CMSG_SPACE(3 * sizeof(int))];
    struct cmsghdr align;
  } ancillary;
  struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = ancillary.bytes,
                            .msg_controllen = sizeof ancillary.bytes };
  ssize_t n;
  do n = sys_recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
  while (n == -EINTR);
  if (n < 0) return (int)n;
  int count = 0;
  struct cmsghdr *c = CMSG_FIRSTHDR(&message);
  if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
    count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    memcpy(descriptor, CMSG_DATA(c), (size_t)count * sizeof(int));
  }
  int error = 0;
  if (n == 0)
    error = -ECONNRESET; /* the daemon hung up */
  else if (n != sizeof *reply || reply->magic != VMMC_MAGIC)
    error = -EPROTO; /* another version of vmmc-emu */
  else if (reply->error) {
    error = -reply->error;
    atomic_store_explicit(&needed_bytes, reply->needed_bytes, memory_order_relaxed);
    atomic_store_explicit(&free_bytes, reply->free_bytes, memory_order_relaxed);
  }
  else if (count != 3)
    error = -EMFILE; /* the kernel drops descriptors that do not fit under the limit */
  if (error)
    for (int i = 0; i < count; i++) sys_close(descriptor[i]);
  return error;
}

static void *map(int fd, uint64_t bytes, int protection) {
  void *base = mmap(NULL, bytes, protection, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) return NULL;
  /* A child of fork must not write as if it were its parent; a core file must not hold gigabytes. */
  madvise(base, bytes, MADV_DONTFORK);
  madvise(base, bytes, MADV_DONTDUMP);
  return base;
}

static void unmap(struct endpoint *e) {
  if (e->app) munmap(e->app, VMMC_APP_BYTES);
  if (e->nic) munmap((void *)e->nic, VMMC_NIC_BYTES);
  if (e->pub) munmap((void *)e->pub, sizeof *e->pub);
}

/* 0 or -errno; the descriptors are closed either way. */
static int map_segments(struct endpoint *e, const int descriptor[3]) {
  int error = 0;
  e->app = map(descriptor[0], VMMC_APP_BYTES, PROT_READ | PROT_WRITE);
  if (e->app) e->nic = map(descriptor[1], VMMC_NIC_BYTES, PROT_READ);
  if (e->nic) e->pub = map(descriptor[2], sizeof *e->pub, PROT_READ);
  if (!e->pub) error = -errno;
  for (int i = 0; i < 3; i++) sys_close(descriptor[i]);
  if (!error) error = endpoint_commit(e->app, VMMC_APP_COMMANDS, true);
  if (!error) error = endpoint_commit(e->nic, sizeof(struct vmmc_nic_header), false);
  if (error) unmap(e);
  return error;
}

static void introduce(struct endpoint *e) {
  struct vmmc_app_header *header = app_header(e);
  header->pid = e->pid;
  strncpy(header->command, program_invocation_short_name, sizeof header->command - 1);
  header->version = VMMC_LAYOUT_VERSION;
  /* Where the kernel, or a filter over it, does not have it, idle rings keep their pages. */
  header->barriers = sys_call(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0, 0, 0, 0) == 0;
  header->magic = VMMC_MAGIC;
}

/* Asks and is answered: a connection to the daemon and three descriptors, or -errno. */
static int ask(const char *socket_path, uint32_t kind, struct vmmc_attach_reply *reply, int descriptor[3]) {
  int fd = talk_to_daemon(socket_path);
  int error = fd < 0 ? fd : say(fd, kind, 0, -1);
  /* A daemon without descriptors answers and hangs up before it has heard anything. */
  if (!error || error == -EPIPE) error = hear(fd, reply, descriptor);
  if (!error) return fd;
  if (fd >= 0) sys_close(fd);
  return error;
}

int endpoint_attach(const char *socket_path, bool visitor, struct endpoint **out) {
  struct endpoint *e = calloc(1, sizeof *e);
  if (!e) return -ENOMEM;
  int saved = errno;
  struct vmmc_attach_reply reply;
  int descriptor[3];
  /* A daemon that is killed takes along the connections that it had accepted.  Its successor listens on the same
   * socket, and those who connect meanwhile wait in its queue. */
  int fd, tries = 0;
  do fd = ask(socket_path, visitor ? VMMC_VISIT : VMMC_ATTACH, &reply, descriptor);
  while ((fd == -ECONNRESET || fd == -EPIPE) && ++tries < ATTACH_TRIES);
  if (fd == -ECONNRESET || fd == -EPIPE) fd = -ECONNREFUSED;
  int error = fd < 0 ? fd : map_segments(e, descriptor);
  if (!error) {
    e->node = reply.node;
    e->nodes = reply.nodes;
    e->index = reply.endpoint;
    e->serial = reply.serial;
    e->pid = sys_getpid();
    introduce(e);
    e->attach_fd = endpoint_private_descriptor(fd);
    fd = -1;
    if (e->attach_fd < 0) {
      error = e->attach_fd;
      unmap(e);
    }
  }
  if (fd >= 0) sys_close(fd);
  errno = saved;
  if (error) {
    free(e);
    return error;
  }
  *out = e;
  return 0;
}

void endpoint_detach(struct endpoint *e) {
  struct endpoint *expected = e;
  if (atomic_compare_exchange_strong(&current, &expected, NULL))
    atomic_store_explicit(mark_of(), 0, memory_order_relaxed);
  endpoint_private_close(e->attach_fd);
  unmap(e);
  free(e);
}

int endpoint_give_waker(struct endpoint *e, uint32_t number, int eventfd) {
  return say(e->attach_fd, VMMC_WAKER, number, eventfd);
}

bool endpoint_give_memory(struct endpoint *e) {
  int known = atomic_load_explicit(&e->memory, memory_order_relaxed);
  if (known) return known > 0;
  /* A process may always open itself, whatever ptrace's rules are; but not when it is not dumpable. */
  int fd = (int)sys_call(SYS_openat, AT_FDCWD, (long)"/proc/self/mem", O_RDWR | O_CLOEXEC, 0, 0, 0);
  bool given = fd >= 0 && say(e->attach_fd, VMMC_WAKER, VMMC_MEMORY, fd) == 0;
  if (fd >= 0) sys_close(fd);
  atomic_store_explicit(&e->memory, given ? 1 : -1, memory_order_relaxed); /* threads that do it twice do no harm */
  return given;
}

/* ---- the process's own endpoint, and fork ------------------------------------------------------ */

/* In a child of fork: what the parent attached is not ours.  The structure stays, empty: sockets that
 * the child inherited point at it and are recognised by that. */
static void forget(bool close_descriptors) {
  struct endpoint *e = atomic_load_explicit(&current, memory_order_relaxed);
  atomic_store_explicit(&current, NULL, memory_order_relaxed);
  atomic_store_explicit(mark_of(), 0, memory_order_relaxed);
  for (int word = 0; word < PRIVATE_END / 64; word++) {
    if (!atomic_load_explicit(&private_bits[word], memory_order_relaxed)) continue;
    uint64_t bits = atomic_exchange_explicit(&private_bits[word], 0, memory_order_relaxed);
    for (; bits && close_descriptors; bits &= bits - 1) sys_close(word * 64 + __builtin_ctzll(bits));
  }
  if (!e) return;
  e->app = NULL;
  e->nic = NULL;
  e->pub = NULL;
  e->attach_fd = -1;
}

static void before_fork(void) { pthread_mutex_lock(&attach_lock); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&attach_lock); }

static void after_fork_in_child(void) {
  /* The attach socket must close here: the daemon takes its end for the parent's. */
  forget(true);
  pthread_mutex_unlock(&attach_lock);
  if (fork_hook) fork_hook();
}

void endpoint_on_fork(void (*hook)(void)) { fork_hook = hook; }

bool endpoint_is_ours(void) { return atomic_load_explicit(mark_of(), memory_order_relaxed); }

struct endpoint *endpoint_current(void) {
  /* acquire: whoever finds the endpoint finds it filled */
  struct endpoint *e = atomic_load_explicit(&current, memory_order_acquire);
  return endpoint_is_ours() ? e : NULL;
}

/* Once a process: the page that forks wipe, and the handlers.  0 or -errno. */
static int watch_forks_once(void) {
  void *page = mmap(NULL, VMMC_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return -errno;
  madvise(page, VMMC_PAGE, MADV_WIPEONFORK); /* before Linux 4.14 the fork handler alone has to do */
  int error = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  if (error) {
    munmap(page, VMMC_PAGE);
    return -error;
  }
  atomic_store_explicit(&mark, page, memory_order_release);
  return 0;
}

static int watch_forks(void) {
  static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
  static _Atomic bool watching;
  if (atomic_load_explicit(&watching, memory_order_acquire)) return 0;
  uint64_t signals;
  sys_block_signals(&signals);
  pthread_mutex_lock(&once);
  int error = atomic_load_explicit(&watching, memory_order_relaxed) ? 0 : watch_forks_once();
  if (!error) atomic_store_explicit(&watching, true, memory_order_release);
  pthread_mutex_unlock(&once);
  sys_restore_signals(&signals);
  return error;
}

/* One line, once a process: the program itself will say no more than "cannot connect". */
static void explain(const char *path, int error) {
  static bool explained;
  if (explained) return;
  explained = true;
  const char *node = getenv("VMMC_NODE");
  uint64_t needed = atomic_load_explicit(&needed_bytes, memory_order_relaxed);
  char line[512], room[128] = "";
  if ((error == ENOSPC || error == ENOMEM) && needed)
    snprintf(room, sizeof room, ": %llu KiB are needed in /dev/shm and %llu KiB are free",
             (unsigned long long)needed / 1024,
             (unsigned long long)atomic_load_explicit(&free_bytes, memory_order_relaxed) / 1024);
  const char *advice = error == EACCES || error == EPERM ? " (a cluster serves the user who started it)"
                       : error == ECONNREFUSED || error == ENOENT
                         ? " (is the cluster up, and has the node a daemon? `vmmc-emu status` tells more)"
                         : "";
  int n = snprintf(line, sizeof line, "vmmc: %s cannot use sockets of %s: attaching at %.200s: %s%s%s\n",
                   program_invocation_short_name, node ? node : "its node", path, strerror(error), room, advice);
  if (n > (int)sizeof line - 1) n = sizeof line - 1;
  sys_call(SYS_write, STDERR_FILENO, (long)line, n, 0, 0, 0);
}

int endpoint_served(struct endpoint *e) {
  if (__builtin_expect(!endpoint_detached(e), 1)) return 0;
  if (atomic_exchange(&e->end_said, true)) return -ENETDOWN;
  bool nic_is_there = atomic_load_explicit(&nic_header(e)->detached, memory_order_relaxed) == 1;
  char line[320], why[sizeof nic_header(e)->why];
  memcpy(why, nic_header(e)->why, sizeof why);
  int n = snprintf(line, sizeof line,
                   "vmmc: %s[%d] is detached from node%u and has no network any more: %.*s%s\n",
                   program_invocation_short_name, (int)e->pid, e->node, (int)strnlen(why, sizeof why), why,
                   nic_is_there ? " (the NIC's log: vmmc-emu logs; other programs go on)" : "");
  if (n > (int)sizeof line - 1) n = sizeof line - 1;
  sys_call(SYS_write, STDERR_FILENO, (long)line, n, 0, 0, 0);
  return -ENETDOWN;
}

static int attach_default(void) {
  if (endpoint_current()) return 0; /* another thread was faster */
  const char *path = getenv("VMMC_SOCKET");
  if (!path || !*path) return -ENOTCONN;
  /* A child whose fork ran no handlers: its copies of our descriptors may be closed and the numbers
   * in other use, so they are left alone; they are close-on-exec. */
  if (atomic_load_explicit(&current, memory_order_relaxed)) forget(false);
  struct endpoint *e;
  int error = endpoint_attach(path, false, &e);
  if (error) {
    explain(path, -error);
    return error;
  }
  atomic_store_explicit(mark_of(), 1, memory_order_relaxed);
  /* release: see endpoint_current */
  atomic_store_explicit(&current, e, memory_order_release);
  return 0;
}

struct endpoint *endpoint_default(void) {
  struct endpoint *e = endpoint_current();
  if (e) return e;
  /* Before the lock: who forks meanwhile waits for it, or its child could not attach. */
  int unwatched = watch_forks();
  if (unwatched) {
    errno = -unwatched;
    return NULL;
  }
  /* No handler of the program's may run in here: it could want a socket, too. */
  uint64_t signals;
  sys_block_signals(&signals);
  pthread_mutex_lock(&attach_lock);
  int error = attach_default();
  pthread_mutex_unlock(&attach_lock);
  sys_restore_signals(&signals);
  if (error) errno = -error;
  return error ? NULL : endpoint_current();
}

/* ---- the doorbell ------------------------------------------------------------------------------ */

/* Where the thread runs that gives work.  relaxed: a hint, which the last thread of several gives. */
static inline void tell_cpu(const struct endpoint *e) {
  _Atomic uint32_t *cpu = &app_header(e)->cpu;
  uint32_t here = vmmc_idle_cpu();
  if (atomic_load_explicit(cpu, memory_order_relaxed) != here) atomic_store_explicit(cpu, here, memory_order_relaxed);
}

/* Wakes the NIC when it sleeps.  The store or RMW before it is ordered before this look by a fence of
 * the caller's; the NIC stores `asleep`, fences, and looks at the doorbells again. */
static inline void wake_nic(const struct endpoint *e) {
  if (!atomic_load_explicit(&e->pub->asleep, memory_order_relaxed)) return;
  _Atomic uint32_t *bell = &app_header(e)->bell;
  /* Changed before the wake: a NIC that is past its last look, but not yet asleep, finds it changed. */
  atomic_fetch_add(bell, 1);
  sys_call(SYS_futex, (long)bell, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
}

/*
 * A bit that is set already needs no locked instruction.  The fence puts the caller's stores before the
 * look at the bit; the NIC clears a bit before it looks at what those stores changed.  So if the bit is
 * seen set, the NIC's clearing is still to come, and its look after that.  Both words are looked at: a
 * thread that set the bit may not have come to the summary yet.
 */
void endpoint_ring_slot(struct endpoint *e, uint32_t slot) {
  _Atomic uint64_t *dirty = (_Atomic uint64_t *)(e->app + VMMC_APP_DIRTY) + slot / 64;
  _Atomic uint64_t *summary = &app_header(e)->summary[slot / 4096];
  uint64_t bit = 1ull << (slot % 64), word = 1ull << (slot / 64 % 64);
  atomic_thread_fence(memory_order_seq_cst);
  if (!(atomic_load_explicit(dirty, memory_order_relaxed) & bit)) atomic_fetch_or(dirty, bit);
  if (!(atomic_load_explicit(summary, memory_order_relaxed) & word)) {
    atomic_fetch_or(summary, word);
    atomic_thread_fence(memory_order_seq_cst);
  }
  tell_cpu(e);
  wake_nic(e);
}

/*
 * Loopback TCP has delivered before send returns, and programs count on it: what two sends caused, one look
 * finds.  Here the NIC delivers, and it may be waiting for the core that its program keeps busy.
 */
bool endpoint_let_nic_look(struct vmmc_idle *idle) {
  struct endpoint *e = endpoint_current();
  for (uint32_t s = 0; e && s < VMMC_SUMMARY_WORDS; s++)
    if (atomic_load_explicit(&app_header(e)->summary[s], memory_order_relaxed))
      return vmmc_idle_yield(idle, vmmc_now_ns());
  return false;
}

/* A turn that is under way may be past the doorbells; the next one forwards, and the one after it places what was for
 * this node itself.  acquire: what a turn did, before it is over. */
bool endpoint_let_nic_catch_up(void) {
  enum { TURNS = 3, PATIENCE_NS = 100000000 }; /* not for ever: a NIC may be stopped, or its successor be late */
  struct wait_thread *self = wait_self();
  struct endpoint *e = endpoint_current();
  if (!self->rang || !e) return false;
  self->rang = false;
  uint64_t since = atomic_load_explicit(&e->pub->turns, memory_order_acquire), now = vmmc_now_ns();
  for (uint64_t end = now + PATIENCE_NS; now < end; now = vmmc_now_ns()) {
    if (atomic_load_explicit(&e->pub->turns, memory_order_acquire) - since >= TURNS) break;
    wake_nic(e);
    sched_yield(); /* also where the cores are held by others: a call that does not wait is no reason to miss bytes */
  }
  return true;
}

void endpoint_ring_commands(struct endpoint *e) {
  atomic_thread_fence(memory_order_seq_cst); /* command_tail before the look at `asleep` */
  tell_cpu(e);
  wake_nic(e);
}
