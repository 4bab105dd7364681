/* Threads cancelled in blocking calls leave nothing behind: the descriptors that they used close afterwards,
 * the peer sees the end, and no number is lost.  The same over the kernel and on a node. */
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>

#include "check.h"

static int mine, peer, extra[2]; /* the two ends of a connection; a pipe in which nothing happens */
static _Atomic int tid;

static char block[65536];

static void *in_recv(void *arg) { return recv(mine, block, sizeof block, 0), arg; }
static void *in_recv_all(void *arg) { return recv(mine, block, sizeof block, MSG_WAITALL), arg; }
static void *in_send(void *arg) {
  while (send(mine, block, sizeof block, 0) > 0) {
  }
  return arg;
}
static void *in_poll(void *arg) { return poll(&(struct pollfd){.fd = mine, .events = POLLIN}, 1, -1), arg; }
static void *in_mixed_poll(void *arg) {
  struct pollfd set[] = {{.fd = mine, .events = POLLIN}, {.fd = extra[0], .events = POLLIN}};
  return poll(set, 2, -1), arg;
}
static void *in_select(void *arg) {
  fd_set set;
  FD_ZERO(&set);
  FD_SET(mine, &set);
  FD_SET(extra[0], &set);
  return select(FD_SETSIZE, &set, NULL, NULL, NULL), arg;
}
static int epoll;
static void *in_epoll(void *arg) {
  struct epoll_event event;
  return epoll_wait(epoll, &event, 1, -1), arg;
}
static void *in_accept(void *arg) { return accept(mine, NULL, NULL), arg; }

struct start {
  void *(*call)(void *);
};
static void *begin(void *start) {
  atomic_store(&tid, (int)syscall(SYS_gettid));
  return ((struct start *)start)->call(NULL);
}

static int is_asleep(const char *line) { /* state: the letter behind the name in parentheses */
  const char *end = strrchr(line, ')');
  return end && end[2] == 'S';
}

/* Runs the call in a thread, waits until it is asleep, and cancels it. */
static void cancel_in(void *(*call)(void *)) {
  pthread_t thread;
  void *result;
  char path[64], line[512];
  atomic_store(&tid, 0);
  struct start start = {call};
  CHECK(pthread_create(&thread, NULL, begin, &start) == 0);
  while (!atomic_load(&tid)) sched_yield();
  snprintf(path, sizeof path, "/proc/self/task/%d/stat", atomic_load(&tid));
  for (int asleep = 0; asleep < 3;) { /* a thread also sleeps when it waits for memory, say, but not for long */
    FILE *file = fopen(path, "r");
    CHECK(file && fgets(line, sizeof line, file));
    fclose(file);
    asleep = is_asleep(line) ? asleep + 1 : 0;
    sched_yield();
  }
  CHECK(pthread_cancel(thread) == 0);
  CHECK(pthread_join(thread, &result) == 0);
  CHECK(result == PTHREAD_CANCELED);
}

static int listening(struct sockaddr_in *address) {
  socklen_t length = sizeof *address;
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  CHECK(bind(fd, (struct sockaddr *)address, length) == 0 && listen(fd, 5) == 0);
  CHECK(getsockname(fd, (struct sockaddr *)address, &length) == 0);
  return fd;
}

static void pair(void) {
  struct sockaddr_in address;
  int listener = listening(&address);
  mine = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(connect(mine, (struct sockaddr *)&address, sizeof address) == 0);
  peer = accept(listener, NULL, NULL);
  CHECK(peer >= 0 && close(listener) == 0);
}

static void check_end(void) {
  CHECK(close(mine) == 0);
  while (1) {
    ssize_t length = recv(peer, block, sizeof block, 0);
    CHECK(length >= 0);
    if (!length) break;
  }
  CHECK(close(peer) == 0);
}

int main(void) {
  alarm(60);
  CHECK(pipe(extra) == 0);
  pair();
  check_end();
  int next = dup(0);
  close(next);

  void *(*const calls[])(void *) = {in_recv, in_recv_all, in_send, in_poll, in_mixed_poll, in_select};
  for (unsigned i = 0; i < sizeof calls / sizeof *calls; i++) {
    pair();
    cancel_in(calls[i]);
    check_end();
  }
  for (int mixed = 0; mixed < 2; mixed++) {
    pair();
    epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, mine, &event) == 0);
    if (mixed) CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, extra[0], &event) == 0);
    cancel_in(in_epoll);
    /* The set works on, and wakes. */
    CHECK(send(peer, "x", 1, 0) == 1 && epoll_wait(epoll, &event, 1, -1) == 1 && recv(mine, block, 1, 0) == 1);
    check_end();
    CHECK(close(epoll) == 0);
  }
  struct sockaddr_in address;
  mine = listening(&address);
  cancel_in(in_accept);
  CHECK(close(mine) == 0);
  mine = socket(AF_INET, SOCK_STREAM, 0);
  CHECK_FAILS(connect(mine, (struct sockaddr *)&address, sizeof address), ECONNREFUSED);
  CHECK(close(mine) == 0);

  int now = dup(0);
  CHECK(now == next);
  puts("ok");
  return 0;
}
