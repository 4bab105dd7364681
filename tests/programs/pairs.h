/* pairs.h: for programs that print what calls on pairs of sockets gave, the same over the kernel and on a node; also
 * by threads that are to be found asleep in them: these are waited for until the kernel says so. */
#ifndef PAIRS_H
#define PAIRS_H

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <time.h>

#include "check.h"

#define TELL(call)                                                                             \
  do {                                                                                         \
    errno = 0;                                                                                 \
    long result_ = (long)(call);                                                               \
    printf("%s: %ld %s\n", #call, result_, result_ < 0 ? strerrorname_np(errno) : "");         \
  } while (0)

enum { ROOM = 16 << 20 };
static char bytes[ROOM] __attribute__((unused)), back[ROOM] __attribute__((unused));

static inline int listening(struct sockaddr_in *address, bool shared) {
  socklen_t length = sizeof *address;
  int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  CHECK(!shared || setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one) == 0);
  CHECK(bind(fd, (struct sockaddr *)address, length) == 0 && listen(fd, 128) == 0);
  CHECK(getsockname(fd, (struct sockaddr *)address, &length) == 0);
  return fd;
}

static inline int connected(const struct sockaddr_in *address) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(fd >= 0 && connect(fd, (const struct sockaddr *)address, sizeof *address) == 0);
  return fd;
}

struct pair {
  int a, b;
};
static inline struct pair pair(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  struct pair p;
  int listener = listening(&address, false);
  p.a = connected(&address);
  p.b = accept(listener, NULL, NULL);
  CHECK(p.b >= 0 && close(listener) == 0);
  return p;
}

static inline void arrives(int fd) { CHECK(poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, 20000) == 1); }

static inline void receive_all(int fd, char *into, size_t length) {
  for (size_t got = 0; got < length;) {
    ssize_t n = recv(fd, into + got, length - got, 0);
    CHECK(n > 0);
    got += (size_t)n;
  }
}

static inline void fill_bytes(void) {
  for (size_t i = 0; i < ROOM; i++) bytes[i] = (char)(i * 2654435761u >> 13);
}

/* Sends until nothing fits any more, nor does after the peer's part of it was taken in. */
static inline size_t fill(int fd) {
  size_t total = 0;
  while (poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, 100) == 1) {
    ssize_t n = send(fd, bytes + total, ROOM - total, MSG_DONTWAIT);
    CHECK(n > 0);
    total += (size_t)n;
  }
  return total;
}

/* ---- a thread in a call ---- */

struct waiter {
  pthread_t thread;
  _Atomic pid_t id;
  long (*call)(struct waiter *);
  int fd, kernel; /* what it waits on: a socket, and a pipe or -1 */
  long result;
  int error, events;
  char byte;
};

static inline void *wait_in_call(void *argument) {
  struct waiter *w = argument;
  w->id = (pid_t)syscall(SYS_gettid);
  errno = 0;
  w->result = w->call(w);
  w->error = errno;
  return NULL;
}

static inline bool sleeps(pid_t id) {
  char path[64], text[256];
  snprintf(path, sizeof path, "/proc/self/task/%d/stat", id);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  CHECK(fd >= 0);
  ssize_t n = read(fd, text, sizeof text - 1);
  CHECK(n > 0 && close(fd) == 0);
  text[n] = 0;
  return strrchr(text, ')')[2] == 'S';
}

static inline void start(struct waiter *w) {
  CHECK(pthread_create(&w->thread, NULL, wait_in_call, w) == 0);
}
static inline void wait_for_sleep(const struct waiter *w) {
  while (!w->id || !sleeps(w->id)) sched_yield();
}
static inline void join(struct waiter *w) {
  struct timespec limit;
  clock_gettime(CLOCK_REALTIME, &limit);
  limit.tv_sec += 20;
  CHECK(pthread_timedjoin_np(w->thread, NULL, &limit) == 0);
}

static inline long in_recv(struct waiter *w) { return recv(w->fd, &w->byte, 1, 0); }
static inline long in_accept(struct waiter *w) {
  int fd = accept(w->fd, NULL, NULL);
  return fd < 0 ? fd : close(fd);
}
static inline long in_poll(struct waiter *w) {
  struct pollfd set[2] = {{.fd = w->fd, .events = POLLIN}, {.fd = w->kernel, .events = POLLIN}};
  long result = poll(set, 2, -1);
  w->events = set[0].revents;
  return result;
}
static inline long in_select(struct waiter *w) {
  fd_set in;
  FD_ZERO(&in);
  FD_SET(w->fd, &in);
  if (w->kernel >= 0) FD_SET(w->kernel, &in);
  long result = select((w->fd > w->kernel ? w->fd : w->kernel) + 1, &in, NULL, NULL, NULL);
  w->events = result > 0 && FD_ISSET(w->fd, &in);
  return result;
}
static inline long in_epoll(struct waiter *w) {
  struct epoll_event event = {0};
  long result = epoll_wait(w->fd, &event, 1, -1);
  w->events = (int)event.events | (int)event.data.u32 << 16;
  return result;
}

static inline int epoll_of(int fd, int kernel, uint32_t tag) {
  int set = epoll_create1(0);
  struct epoll_event event = {.events = EPOLLIN, .data.u32 = tag};
  CHECK(set >= 0 && epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) == 0);
  CHECK(kernel < 0 || epoll_ctl(set, EPOLL_CTL_ADD, kernel, &event) == 0);
  return set;
}

/* ---- cases ---- */

struct test_case {
  const char *name;
  void (*run)(void);
};
#define CASE(name) {#name, name}

/* The body of main: runs one case, or without an argument says which there are. */
static inline int run_case(int argc, char **argv, const struct test_case *cases, size_t count) {
  if (argc != 2) {
    for (size_t i = 0; i < count; i++) puts(cases[i].name);
    return argc > 1;
  }
  fill_bytes();
  alarm(60);
  for (size_t i = 0; i < count; i++) {
    if (!strcmp(argv[1], cases[i].name)) {
      cases[i].run();
      return 0;
    }
  }
  fprintf(stderr, "no case %s\n", argv[1]);
  return 2;
}

#endif
