/*
 * real.h: the C library's own functions, behind the names that this library takes over.
 *
 * REAL(name)(...) calls the next definition after ours.  All are looked up at once, the first time any is
 * needed: constructors of other libraries run before ours, and a lookup inside a vfork child or a signal
 * handler would be unsafe, so the table is complete long before either.  All of them are in the C library: a lookup
 * that fails allocates memory, and it may be the allocator that asks first.
 */
#ifndef PRELOAD_REAL_H
#define PRELOAD_REAL_H

#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <unistd.h>

/* Functions that this library replaces: visible, the rest of it is not. */
#define INTERPOSE __attribute__((visibility("default")))

/* What the headers do not declare: entry points of fortified and of older programs. */
ssize_t __read_chk(int fd, void *buffer, size_t length, size_t size);
ssize_t __recv_chk(int fd, void *buffer, size_t length, size_t size, int flags);
ssize_t __recvfrom_chk(int fd, void *buffer, size_t length, size_t size, int flags, struct sockaddr *address,
                       socklen_t *address_length);
int __poll_chk(struct pollfd *set, nfds_t count, int timeout_ms, size_t size);
int __ppoll_chk(struct pollfd *set, nfds_t count, const struct timespec *timeout, const sigset_t *mask, size_t size);
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int at, const char *path, int flags);
int __openat64_2(int at, const char *path, int flags);
int __gethostname_chk(char *name, size_t length, size_t size);
void __chk_fail(void) __attribute__((noreturn));
void __longjmp_chk(struct __jmp_buf_tag *buffer, int value) __attribute__((noreturn));

#define REAL_CALLS(X)                                                                                        \
  /* descriptors */                                                                                          \
  X(close) X(dup) X(dup2) X(dup3) X(fcntl) X(fcntl64) X(ioctl) X(close_range) X(closefrom)                   \
  X(open) X(open64) X(openat) X(openat64) X(__open_2) X(__open64_2) X(__openat_2) X(__openat64_2)            \
  X(creat) X(creat64) X(pipe) X(pipe2) X(eventfd) X(timerfd_create)                                          \
  X(signalfd) X(inotify_init) X(inotify_init1) X(memfd_create) X(fopen) X(fopen64) X(fdopen) X(freopen) X(freopen64) \
  /* set-up */                                                                                               \
  X(socket) X(socketpair) X(bind) X(listen) X(accept) X(accept4) X(connect) X(shutdown) X(getsockname)       \
  X(getpeername) X(getsockopt) X(setsockopt)                                                                 \
  /* data */                                                                                                 \
  X(read) X(readv) X(preadv64v2) X(recv) X(recvfrom) X(recvmsg) X(recvmmsg) X(write) X(writev)               \
  X(pwritev64v2) X(send) X(sendto) X(sendmsg) X(sendmmsg) X(sendfile) X(sendfile64) X(splice) X(vdprintf)    \
  /* readiness */                                                                                            \
  X(select) X(pselect) X(poll) X(ppoll) X(epoll_create) X(epoll_create1) X(epoll_ctl) X(epoll_wait)          \
  X(epoll_pwait) X(epoll_pwait2)                                                                             \
  /* names */                                                                                                \
  X(getaddrinfo) X(gethostbyname) X(gethostbyname2) X(gethostbyname_r) X(gethostbyname2_r)                   \
  X(gethostbyaddr) X(gethostbyaddr_r) X(getnameinfo) X(gethostname) X(sethostname) X(uname) X(getifaddrs)    \
  X(if_nametoindex) X(if_indextoname) X(if_nameindex)                                                        \
  X(stat) X(stat64) X(lstat) X(lstat64) X(fstatat) X(fstatat64) X(statx)                                     \
  /* processes and signals */                                                                                \
  X(syscall) X(execve) X(execvpe) X(fexecve) X(execveat) X(posix_spawn) X(posix_spawnp) X(sigaction)       \
  X(sigprocmask) X(pthread_sigmask)                                                                          \
  X(longjmp) X(_longjmp) X(siglongjmp) X(__longjmp_chk)

#define REAL_FIELD(name) __typeof__(&name) name;
struct real_calls {
  REAL_CALLS(REAL_FIELD)
};
extern struct real_calls real_calls;
extern _Atomic bool real_known;
void real_resolve(void);

#define REAL(name) (*(__builtin_expect(!atomic_load_explicit(&real_known, memory_order_acquire), 0) \
                          ? (real_resolve(), real_calls.name)                                          \
                          : real_calls.name))

#endif
