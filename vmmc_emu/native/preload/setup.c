/*
 * setup.c: socket, bind, listen, accept, connect, shutdown, names and options.
 *
 * Every TCP socket is ours from socket() on, and becomes the kernel's when bind or connect shows an
 * address outside the cluster, or a port that VMMC_KERNEL_PORTS keeps on loopback: a kernel socket with the
 * same options is put over its numbers.  Sockets of every other kind are the kernel's from the start.
 */
#include "setup.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>

#include "fault.h"
#include "names.h"
#include "process.h"
#include "readiness.h"
#include "real.h"
#include "sys.h"

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

enum { OPTION_BYTES = 512 }; /* more than any option's value has */

/* One setsockopt call that was granted. */
struct option {
  struct option *next;
  int level, name;
  socklen_t length;
  char value[];
};

/* Result of a libvmmc call in the form of the C library's. */
static int finish(struct file *f, int result) {
  file_put(f);
  if (result >= 0) return result;
  errno = -result;
  return -1;
}

/* Looks up a socket or leaves the calling function: to the kernel, or with EBADF after a fork. */
#define SOCKET_OR(fd, kernel)                       \
  struct file *f = socket_get(fd);                  \
  if (__builtin_expect(f == NULL, 0)) return kernel; \
  if (f == &file_forked) return descriptor_refuse(fd)

static bool is_ours(int domain, int type, int protocol) {
  return process_on_node && (domain == AF_INET || domain == AF_INET6) &&
         (type & ~(SOCK_NONBLOCK | SOCK_CLOEXEC)) == SOCK_STREAM &&
         (protocol == 0 || protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);
}

/* Puts a socket under the placeholder `fd`, which is closed where that fails; takes the reference over. */
static int number_for(struct vsocket *s, int fd, int flags) {
  struct file *f = file_new(FILE_SOCKET, s, NULL);
  if (f) atomic_store_explicit(&f->nonblocking, (flags & SOCK_NONBLOCK) != 0, memory_order_relaxed);
  if (f && descriptor_install(fd, f) == 0) return fd;
  int error = errno;
  if (f) file_put(f);
  else socket_close(s), socket_release(s);
  sys_close(fd);
  errno = error;
  return -1;
}

INTERPOSE int socket(int domain, int type, int protocol) {
  if (!process_on_node) process_begin();
  if (!is_ours(domain, type, protocol)) return descriptor_fresh(REAL(socket)(domain, type, protocol));
  if (!process_is_ours()) process_forked();
  int fd = descriptor_placeholder(type & SOCK_CLOEXEC);
  if (fd < 0) return -1;
  struct vsocket *s = socket_new(domain);
  if (s) return number_for(s, fd, type);
  sys_close(fd);
  errno = ENOMEM;
  return -1;
}

INTERPOSE int socketpair(int domain, int type, int protocol, int pair[2]) {
  int result = REAL(socketpair)(domain, type, protocol, pair);
  if (result == 0) descriptor_fresh(pair[0]), descriptor_fresh(pair[1]);
  return result;
}

/* ---- a socket becomes the kernel's ---- */

static void remember_option(struct file *f, int level, int name, const void *value, socklen_t length) {
  struct option *o = malloc(sizeof *o + length);
  if (!o) return; /* the option holds for the VMMC socket; a kernel socket would miss it */
  *o = (struct option){.next = f->options, .level = level, .name = name, .length = length};
  memcpy(o->value, value, length);
  f->options = o;
}

void setup_forget_options(struct file *f) {
  while (f->options) {
    struct option *o = f->options;
    f->options = o->next;
    free(o);
  }
}

static void repeat_options(int fd, const struct option *o) {
  if (!o) return;
  repeat_options(fd, o->next); /* the list has the newest first */
  REAL(setsockopt)(fd, o->level, o->name, o->value, o->length);
}

struct replacement {
  struct file *file;
  int kernel_fd, error;
};

static void put_over(int fd, struct file *f, void *context) {
  struct replacement *r = context;
  if (f != r->file) return;
  int flags = REAL(fcntl)(fd, F_GETFD);
  /* In this order a thread that uses the number meanwhile meets the VMMC socket or the kernel's, never
   * the placeholder. */
  if (REAL(dup3)(r->kernel_fd, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0) < 0) r->error = errno;
  else descriptor_forget(fd);
}

/* Puts a kernel socket over all numbers of f, which the caller holds. 0, or -1 with errno. */
static int become_kernel(struct file *f) {
  struct sockaddr_storage local = {0};
  socklen_t length = sizeof local;
  int fd = REAL(socket)(f->socket->family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  repeat_options(fd, f->options);
  int error = 0;
  if (atomic_load(&f->socket->phase) == SOCKET_BOUND &&
      socket_name(f->socket, false, (struct sockaddr *)&local, &length) == 0) {
    /* Ports of the node are not ports of the host: where it is taken there, the connection goes out
     * from another, but an address that only the node has cannot be kept. */
    if (REAL(bind)(fd, (struct sockaddr *)&local, length) < 0 && errno != EADDRINUSE) error = errno;
  }
  if (!error && atomic_load(&f->nonblocking)) {
    int on = 1;
    if (REAL(ioctl)(fd, FIONBIO, &on) < 0) error = errno;
  }
  if (!error) {
    struct replacement r = {.file = f, .kernel_fd = fd};
    struct epoll_move *moved = readiness_leave(f);
    descriptor_walk(0, UINT32_MAX, put_over, &r);
    readiness_join_kernel(moved);
    error = r.error;
  }
  sys_close(fd);
  errno = error;
  return error ? -1 : 0;
}

static bool has_ip(const struct sockaddr *address, socklen_t length) {
  return (length >= sizeof(struct sockaddr_in) && address->sa_family == AF_INET) ||
         (length >= sizeof(struct sockaddr_in6) && address->sa_family == AF_INET6);
}

static uint16_t port_of(const struct sockaddr *address) {
  return ntohs(address->sa_family == AF_INET ? ((const struct sockaddr_in *)(const void *)address)->sin_port
                                             : ((const struct sockaddr_in6 *)(const void *)address)->sin6_port);
}

/* Loopback or a wildcard: addresses that the host has as well. */
static bool is_on_host(const struct sockaddr *address) {
  if (address->sa_family == AF_INET) {
    uint32_t ip = ntohl(((const struct sockaddr_in *)(const void *)address)->sin_addr.s_addr);
    return ip >> 24 == 127 || ip == 0;
  }
  const struct in6_addr *ip = &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr;
  if (IN6_IS_ADDR_V4MAPPED(ip)) return ip->s6_addr[12] == 127 || !memcmp(ip->s6_addr + 12, "\0\0\0\0", 4);
  return IN6_IS_ADDR_LOOPBACK(ip) || IN6_IS_ADDR_UNSPECIFIED(ip);
}

/* An address as the program gives it: 0 or a negative errno. */
static int take_address(struct sockaddr_storage *address, const struct sockaddr *given, socklen_t length) {
  if (length > sizeof *address) return -EINVAL;
  return !length || fault_copy(address, given, length) ? 0 : -EFAULT;
}

bool setup_refuses(int fd, const struct sockaddr *given, socklen_t length) {
  struct sockaddr_storage taken;
  const struct sockaddr *address = (const struct sockaddr *)&taken;
  uint32_t node;
  if (!process_on_node || !given || take_address(&taken, given, length) || !has_ip(address, length) ||
      is_on_host(address) || socket_route_of(address, length, &node) == ROUTE_KERNEL)
    return false;
  int type = 0;
  socklen_t size = sizeof type;
  if (REAL(getsockopt)(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0) return false; /* the kernel says what it is */
  static _Atomic bool said;
  if (!atomic_exchange(&said, true))
    process_say("a %s socket cannot reach a node of the cluster: only TCP stream sockets run over VMMC; nothing is "
                "sent (ENETUNREACH)",
                type == SOCK_DGRAM ? "datagram" : type == SOCK_RAW ? "raw" : "kernel");
  errno = ENETUNREACH;
  return true;
}

/* How much room the program has for a result: 0 or a negative errno. */
static int take_room(socklen_t *room, const socklen_t *length) {
  if (!fault_copy(room, length, sizeof *room)) return -EFAULT;
  return (int32_t)*room < 0 ? -EINVAL : 0;
}

/* Stores a socket's name for the program, as much as fits, and its whole length. */
static int tell_name(struct vsocket *s, bool peer, struct sockaddr *address, socklen_t *length) {
  struct sockaddr_storage name;
  socklen_t size = sizeof name, room;
  int error = socket_name(s, peer, (struct sockaddr *)&name, &size);
  if (!error) error = take_room(&room, length);
  if (error) return error;
  return fault_copy(address, &name, room < size ? room : size) && fault_copy(length, &size, sizeof size) ? 0 : -EFAULT;
}

/* ---- the calls ---- */

INTERPOSE int bind(int fd, const struct sockaddr *given, socklen_t length) {
  SOCKET_OR(fd, REAL(bind)(fd, given, length));
  struct sockaddr_storage taken;
  const struct sockaddr *address = (const struct sockaddr *)&taken;
  int error = take_address(&taken, given, length);
  if (error) return finish(f, error);
  uint32_t node;
  if (has_ip(address, length) && address->sa_family == f->socket->family &&
      atomic_load(&f->socket->phase) == SOCKET_NEW &&
      ((is_on_host(address) && socket_port_is_kernels(port_of(address))) ||
       (!socket_address_is_local(address, length) && socket_route_of(address, length, &node) == ROUTE_KERNEL))) {
    int result = become_kernel(f);
    return finish(f, result < 0 ? -errno : 0) < 0 ? -1 : REAL(bind)(fd, address, length);
  }
  int result = socket_bind(f->socket, address, length);
  readiness_changed(f);
  return finish(f, result);
}

INTERPOSE int listen(int fd, int backlog) {
  SOCKET_OR(fd, REAL(listen)(fd, backlog));
  int result = socket_listen(f->socket, backlog);
  readiness_changed(f);
  return finish(f, result);
}

static int connect_call(int fd, const struct sockaddr *given, socklen_t length) {
  pthread_testcancel();
  SOCKET_OR(fd, setup_refuses(fd, given, length) ? -1 : REAL(connect)(fd, given, length));
  struct sockaddr_storage taken;
  const struct sockaddr *address = (const struct sockaddr *)&taken;
  int error = take_address(&taken, given, length);
  if (error) return finish(f, error);
  uint32_t node;
  uint32_t phase = atomic_load(&f->socket->phase);
  if (has_ip(address, length) && (phase == SOCKET_NEW || phase == SOCKET_BOUND) &&
      (socket_route_of(address, length, &node) == ROUTE_KERNEL ||
       (is_on_host(address) && socket_port_is_kernels(port_of(address))))) {
    int result = become_kernel(f);
    return finish(f, result < 0 ? -errno : 0) < 0 ? -1 : REAL(connect)(fd, address, length);
  }
  int result;
  {
    HOLDING(f);
    result = socket_connect(f->socket, address, length, atomic_load(&f->nonblocking));
    /* It stops being "hung up" when the request is under way, and has no slot that events could tell of when it
     * failed: also for who watches it only since. */
    readiness_changed(f);
  }
  if (result >= 0) return result;
  errno = -result;
  return -1;
}
INTERPOSE int connect(int fd, const struct sockaddr *address, socklen_t length) {
  return connect_call(fd, address, length);
}
int __connect(int fd, const struct sockaddr *address, socklen_t length)
    __attribute__((alias("connect"), visibility("default")));

static void close_number(void *number) {
  if (*(int *)number >= 0) sys_close(*(int *)number);
}

/* f stays the caller's. The new number or -errno. */
static int accept_held(struct file *f, struct sockaddr *address, socklen_t *length, int flags) {
  bool nonblocking = atomic_load(&f->nonblocking);
  struct vsocket *s = NULL;
  /* The number first, as in the kernel: without one the connection stays in the queue.  A look at an empty
   * queue needs none. */
  if (nonblocking && atomic_load(&f->socket->phase) == SOCKET_LISTENING && !socket_ready(f->socket)) return -EAGAIN;
  int number = descriptor_placeholder(flags & SOCK_CLOEXEC);
  AT_END(closed, close_number, &number);
  if (number < 0) return -errno;
  int result = socket_accept(f->socket, nonblocking, &s);
  if (result < 0) return result;
  /* Where that cannot be told the connection is lost, as on Linux; one that has ended by now has no name. */
  result = address ? tell_name(s, true, address, length) : 0;
  if (result < 0 && result != -ENOTCONN) {
    socket_close(s);
    socket_release(s);
    return result;
  }
  result = number_for(s, number, flags); /* closes it where that fails */
  number = -1;
  return result < 0 ? -errno : result;
}

static int accept_call(int fd, struct sockaddr *address, socklen_t *length, int flags, bool is_accept4) {
  pthread_testcancel();
  SOCKET_OR(fd, descriptor_fresh(is_accept4 ? REAL(accept4)(fd, address, length, flags)
                                            : REAL(accept)(fd, address, length)));
  if (flags & ~(SOCK_NONBLOCK | SOCK_CLOEXEC)) return finish(f, -EINVAL);
  int result;
  {
    HOLDING(f);
    result = accept_held(f, address, length, flags);
  }
  if (result >= 0) return result;
  errno = -result;
  return -1;
}
INTERPOSE int accept(int fd, struct sockaddr *restrict address, socklen_t *restrict length) {
  return accept_call(fd, address, length, 0, false);
}
INTERPOSE int accept4(int fd, struct sockaddr *restrict address, socklen_t *restrict length, int flags) {
  return accept_call(fd, address, length, flags, true);
}

INTERPOSE int shutdown(int fd, int how) {
  SOCKET_OR(fd, REAL(shutdown)(fd, how));
  int result = socket_shutdown(f->socket, how);
  readiness_changed(f);
  return finish(f, result);
}

/*
 * A kernel socket's name.  A program that looks for its own address connects a datagram socket, which sends nothing,
 * and asks for its name: on a node that is the node's address, and none of the machine's.
 */
static int kernel_name(int fd, struct sockaddr *address, socklen_t *length) {
  socklen_t room, size = sizeof(struct sockaddr_storage);
  bool known = process_on_node && !take_room(&room, length);
  int result = REAL(getsockname)(fd, address, length);
  if (result < 0 || !known || room < sizeof address->sa_family || !has_ip(address, *length)) return result;
  struct sockaddr_storage name, peer;
  int type = 0;
  socklen_t type_size = sizeof type, peer_size = sizeof peer;
  uint32_t node;
  if (REAL(getpeername)(fd, (struct sockaddr *)&peer, &peer_size) < 0 ||
      REAL(getsockname)(fd, (struct sockaddr *)&name, &size) < 0 || is_on_host((struct sockaddr *)&name) ||
      socket_route_of((struct sockaddr *)&name, size, &node) != ROUTE_KERNEL ||
      REAL(getsockopt)(fd, SOL_SOCKET, SO_TYPE, &type, &type_size) < 0 || type != SOCK_DGRAM)
    return 0;
  names_own_address((struct sockaddr *)&name);
  memcpy(address, &name, room < size ? room : size); /* where the kernel has just written as much */
  return 0;
}
INTERPOSE int getsockname(int fd, struct sockaddr *restrict address, socklen_t *restrict length) {
  SOCKET_OR(fd, kernel_name(fd, address, length));
  return finish(f, tell_name(f->socket, false, address, length));
}
INTERPOSE int getpeername(int fd, struct sockaddr *restrict address, socklen_t *restrict length) {
  SOCKET_OR(fd, REAL(getpeername)(fd, address, length));
  return finish(f, tell_name(f->socket, true, address, length));
}
INTERPOSE int getsockopt(int fd, int level, int name, void *restrict value, socklen_t *restrict length) {
  SOCKET_OR(fd, REAL(getsockopt)(fd, level, name, value, length));
  char kept[OPTION_BYTES];
  socklen_t room = 0;
  int result = take_room(&room, length);
  if (room > sizeof kept) room = sizeof kept;
  if (!result) result = socket_getsockopt(f->socket, level, name, kept, &room);
  if (!result && !(fault_copy(value, kept, room) && fault_copy(length, &room, sizeof room))) result = -EFAULT;
  return finish(f, result);
}
/* An option's value.  The kernel reads what the option needs, mostly a number, whatever is said to lie behind it. */
static bool take_option(char taken[OPTION_BYTES], int level, int name, const void *value, socklen_t length) {
  if (fault_copy(taken, value, length < OPTION_BYTES ? length : OPTION_BYTES)) return true;
  bool is_structure = level == SOL_SOCKET && (name == SO_LINGER || name == SO_RCVTIMEO || name == SO_SNDTIMEO);
  return !is_structure && length > sizeof(int) && fault_copy(taken, value, sizeof(int));
}

INTERPOSE int setsockopt(int fd, int level, int name, const void *value, socklen_t length) {
  SOCKET_OR(fd, REAL(setsockopt)(fd, level, name, value, length));
  char taken[OPTION_BYTES] = "";
  if ((int32_t)length > 0 && !take_option(taken, level, name, value, length)) return finish(f, -EFAULT);
  int result = socket_setsockopt(f->socket, level, name, taken, length);
  uint32_t phase = atomic_load(&f->socket->phase);
  /* There may be room now, or enough to read. */
  if (result == 0 && level == SOL_SOCKET && (name == SO_SNDBUF || name == SO_SNDBUFFORCE || name == SO_RCVLOWAT))
    readiness_changed(f);
  if (result == 0 && length <= 64 && (phase == SOCKET_NEW || phase == SOCKET_BOUND))
    remember_option(f, level, name, taken, length);
  return finish(f, result);
}
