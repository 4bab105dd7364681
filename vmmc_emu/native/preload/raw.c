/*
 * raw.c: syscall(), for programs that make calls by number: those that this library takes over come to it.
 *
 * Not those of processes and signals: their raw forms are what runtimes use to go around the C library on
 * purpose, and a child that they make is recognised (descriptors.h, process.h).
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>

#include "fault.h"
#include "process.h"
#include "real.h"

/* The kernel's third form of a mask and its size, as select and poll take them. */
struct mask_argument {
  const sigset_t *mask;
  size_t size;
};

/*
 * io_uring: calls that a ring carries go around this library, and would do to placeholders what was meant for sockets
 * (libuv watches its descriptors that way).  So a node is a machine without it, as many are; programs have another
 * way.  These are liburing's functions, since it makes its system calls itself; off the nodes they are looked up
 * when they are called, since most programs have none.
 */
struct io_uring;
struct io_uring_params;

static int no_rings(void) {
  if (process_diagnostics) process_say("io_uring is not there on a node (ENOSYS): it would go around VMMC");
  return -ENOSYS;
}

/* After ours, or in a liburing that only somebody's plugin sees. */
static void *look_up(const char *name) {
  void *found = dlsym(RTLD_NEXT, name), *library = found ? NULL : dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD);
  return library ? dlsym(library, name) : found;
}

#define RING_CALL(name, parameters, arguments)                                                      \
  INTERPOSE int name parameters;                                                                    \
  int name parameters {                                                                             \
    int (*real) parameters = process_on_node ? NULL : (int (*) parameters)look_up(#name);           \
    return real ? real arguments : no_rings();                                                      \
  }
RING_CALL(io_uring_queue_init, (unsigned entries, struct io_uring *ring, unsigned flags), (entries, ring, flags))
RING_CALL(io_uring_queue_init_params, (unsigned entries, struct io_uring *ring, struct io_uring_params *how),
          (entries, ring, how))
RING_CALL(io_uring_queue_init_mem,
          (unsigned entries, struct io_uring *ring, struct io_uring_params *how, void *memory, size_t size),
          (entries, ring, how, memory, size))
RING_CALL(io_uring_setup, (unsigned entries, struct io_uring_params *how), (entries, how))

#define P(type, n) ((type)(uintptr_t)a[n])
#define N(type, n) ((type)a[n])

static long taken_over(long number, const long *a, bool *mine) {
  switch (number) {
    /* descriptors */
    case SYS_close: return close(N(int, 0));
    case SYS_dup: return dup(N(int, 0));
#ifdef SYS_dup2
    case SYS_dup2: return dup2(N(int, 0), N(int, 1));
#endif
    case SYS_dup3: return dup3(N(int, 0), N(int, 1), N(int, 2));
    case SYS_fcntl: return fcntl(N(int, 0), N(int, 1), a[2]);
    case SYS_ioctl: return ioctl(N(int, 0), N(unsigned long, 1), a[2]);
    case SYS_close_range: return close_range(N(unsigned, 0), N(unsigned, 1), N(int, 2));
    /* set-up */
    case SYS_socket: return socket(N(int, 0), N(int, 1), N(int, 2));
    case SYS_bind: return bind(N(int, 0), P(const struct sockaddr *, 1), N(socklen_t, 2));
    case SYS_listen: return listen(N(int, 0), N(int, 1));
    case SYS_accept: return accept(N(int, 0), P(struct sockaddr *, 1), P(socklen_t *, 2));
    case SYS_accept4: return accept4(N(int, 0), P(struct sockaddr *, 1), P(socklen_t *, 2), N(int, 3));
    case SYS_connect: return connect(N(int, 0), P(const struct sockaddr *, 1), N(socklen_t, 2));
    case SYS_shutdown: return shutdown(N(int, 0), N(int, 1));
    case SYS_getsockname: return getsockname(N(int, 0), P(struct sockaddr *, 1), P(socklen_t *, 2));
    case SYS_getpeername: return getpeername(N(int, 0), P(struct sockaddr *, 1), P(socklen_t *, 2));
    case SYS_getsockopt: return getsockopt(N(int, 0), N(int, 1), N(int, 2), P(void *, 3), P(socklen_t *, 4));
    case SYS_setsockopt: return setsockopt(N(int, 0), N(int, 1), N(int, 2), P(const void *, 3), N(socklen_t, 4));
    /* data */
    case SYS_read: return read(N(int, 0), P(void *, 1), N(size_t, 2));
    case SYS_readv: return readv(N(int, 0), P(const struct iovec *, 1), N(int, 2));
    case SYS_recvfrom:
      return recvfrom(N(int, 0), P(void *, 1), N(size_t, 2), N(int, 3), P(struct sockaddr *, 4), P(socklen_t *, 5));
    case SYS_recvmsg: return recvmsg(N(int, 0), P(struct msghdr *, 1), N(int, 2));
    case SYS_recvmmsg:
      return recvmmsg(N(int, 0), P(struct mmsghdr *, 1), N(unsigned, 2), N(int, 3), P(struct timespec *, 4));
    case SYS_write: return write(N(int, 0), P(const void *, 1), N(size_t, 2));
    case SYS_writev: return writev(N(int, 0), P(const struct iovec *, 1), N(int, 2));
    case SYS_sendto:
      return sendto(N(int, 0), P(const void *, 1), N(size_t, 2), N(int, 3), P(const struct sockaddr *, 4), N(socklen_t, 5));
    case SYS_sendmsg: return sendmsg(N(int, 0), P(const struct msghdr *, 1), N(int, 2));
    case SYS_sendmmsg: return sendmmsg(N(int, 0), P(struct mmsghdr *, 1), N(unsigned, 2), N(int, 3));
    case SYS_sendfile: return sendfile64(N(int, 0), N(int, 1), P(off64_t *, 2), N(size_t, 3));
    case SYS_preadv2: /* the position is in two halves where a word is too short for it; -1 is -1 in both */
      return preadv64v2(N(int, 0), P(const struct iovec *, 1), N(int, 2), N(off64_t, 3), N(int, 5));
    case SYS_pwritev2:
      return pwritev64v2(N(int, 0), P(const struct iovec *, 1), N(int, 2), N(off64_t, 3), N(int, 5));
    case SYS_splice:
      return splice(N(int, 0), P(off64_t *, 1), N(int, 2), P(off64_t *, 3), N(size_t, 4), N(unsigned, 5));
    /* readiness */
#ifdef SYS_poll
    case SYS_poll: return poll(P(struct pollfd *, 0), N(nfds_t, 1), N(int, 2));
#endif
#ifdef SYS_select
    case SYS_select:
      return select(N(int, 0), P(fd_set *, 1), P(fd_set *, 2), P(fd_set *, 3), P(struct timeval *, 4));
#endif
    case SYS_ppoll: return ppoll(P(struct pollfd *, 0), N(nfds_t, 1), P(const struct timespec *, 2), P(const sigset_t *, 3));
    case SYS_pselect6: {
      struct mask_argument mask = {NULL, 0};
      if (a[5] && !fault_copy(&mask, P(const struct mask_argument *, 5), sizeof mask)) {
        errno = EFAULT;
        return -1;
      }
      return pselect(N(int, 0), P(fd_set *, 1), P(fd_set *, 2), P(fd_set *, 3), P(const struct timespec *, 4), mask.mask);
    }
#ifdef SYS_epoll_create
    case SYS_epoll_create: return epoll_create(N(int, 0));
#endif
    case SYS_epoll_create1: return epoll_create1(N(int, 0));
    case SYS_epoll_ctl: return epoll_ctl(N(int, 0), N(int, 1), N(int, 2), P(struct epoll_event *, 3));
#ifdef SYS_epoll_wait
    case SYS_epoll_wait: return epoll_wait(N(int, 0), P(struct epoll_event *, 1), N(int, 2), N(int, 3));
#endif
    case SYS_epoll_pwait:
      return epoll_pwait(N(int, 0), P(struct epoll_event *, 1), N(int, 2), N(int, 3), P(const sigset_t *, 4));
    case SYS_epoll_pwait2:
      return epoll_pwait2(N(int, 0), P(struct epoll_event *, 1), N(int, 2), P(const struct timespec *, 3),
                          P(const sigset_t *, 4));
#ifdef SYS_io_uring_setup
    case SYS_io_uring_setup:
      errno = -no_rings();
      return -1;
#endif
    /* exec: the program is to stay on the node */
    case SYS_execve: return execve(P(const char *, 0), P(char *const *, 1), P(char *const *, 2));
    default: *mine = false; return 0;
  }
}

/* Arguments that were not passed are taken, as registers are, and not looked at. */
__attribute__((no_sanitize("address"))) INTERPOSE long syscall(long number, ...) {
  va_list arguments;
  long a[6];
  va_start(arguments, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(arguments, long);
  va_end(arguments);
  bool mine = process_on_node;
  long result = mine ? taken_over(number, a, &mine) : 0;
  return mine ? result : REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
