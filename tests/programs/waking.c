/* Whom an event wakes, of many threads that wait for it: one of those that wait in one set for edges, one of the
 * sets that share a socket exclusively; and nobody is forgotten.  The same over the kernel and on a node. */
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/syscall.h>

#include "check.h"

enum { THREADS = 8, ROUNDS = 5 };

static struct sockaddr_in address;
static int listener, pair[2], kernel_side[2];
static _Atomic int returned, tids[THREADS];

struct waiter {
  int set, index;
};

static void *wait_once(void *argument) {
  const struct waiter *waiter = argument;
  struct epoll_event event;
  atomic_store(&tids[waiter->index], (int)syscall(SYS_gettid));
  CHECK(epoll_wait(waiter->set, &event, 1, -1) == 1 && event.events == EPOLLIN);
  atomic_store(&tids[waiter->index], 0);
  atomic_fetch_add(&returned, 1);
  return NULL;
}

static int is_asleep(int tid) {
  char path[64], line[512] = "";
  snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  char *read = fgets(line, sizeof line, file);
  fclose(file);
  const char *end = read ? strrchr(line, ')') : NULL;
  return end && end[2] == 'S';
}

/* Until so many threads have returned, and the others sleep. */
static void settle(int count) {
  while (atomic_load(&returned) < count) sched_yield();
  for (int looks = 0; looks < 3; looks++)
    for (int i = 0; i < THREADS; i++)
      for (int tid; (tid = atomic_load(&tids[i])) != 0 && !is_asleep(tid);) sched_yield();
  CHECK(atomic_load(&returned) == count);
}

static int listen_here(void) {
  socklen_t length = sizeof address;
  address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(bind(fd, (struct sockaddr *)&address, length) == 0 && listen(fd, 64) == 0);
  CHECK(getsockname(fd, (struct sockaddr *)&address, &length) == 0);
  return fd;
}

static int connect_here(void) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(connect(fd, (struct sockaddr *)&address, sizeof address) == 0);
  return fd;
}

static void begin(pthread_t *threads, struct waiter *waiters) {
  atomic_store(&returned, 0);
  for (int i = 0; i < THREADS; i++) {
    atomic_store(&tids[i], -1);
    CHECK(pthread_create(&threads[i], NULL, wait_once, &waiters[i]) == 0);
  }
  settle(0);
}

/* Many threads in one set: each edge is news to one.  `mixed`: the set has a descriptor of the kernel's, too. */
static void one_set(int mixed) {
  pthread_t threads[THREADS];
  struct waiter waiters[THREADS];
  struct epoll_event event = {.events = EPOLLIN | EPOLLET};
  int set = epoll_create1(0);
  CHECK(epoll_ctl(set, EPOLL_CTL_ADD, pair[1], &event) == 0);
  if (mixed) CHECK(epoll_ctl(set, EPOLL_CTL_ADD, kernel_side[0], &event) == 0);
  for (int i = 0; i < THREADS; i++) waiters[i] = (struct waiter){set, i};
  begin(threads, waiters);
  for (int i = 1; i <= THREADS; i++) {
    CHECK(send(pair[0], "x", 1, 0) == 1);
    settle(i);
  }
  for (int i = 0; i < THREADS; i++) CHECK(pthread_join(threads[i], NULL) == 0);
  char bytes[THREADS];
  CHECK(recv(pair[1], bytes, THREADS, MSG_WAITALL) == THREADS && close(set) == 0);
}

/* A set a thread, all with the same listener: a connection wakes one. */
static void exclusive(void) {
  pthread_t threads[THREADS];
  struct waiter waiters[THREADS];
  int clients[THREADS];
  listener = listen_here();
  struct epoll_event event = {.events = EPOLLIN | EPOLLEXCLUSIVE};
  for (int i = 0; i < THREADS; i++) {
    waiters[i] = (struct waiter){epoll_create1(0), i};
    CHECK(epoll_ctl(waiters[i].set, EPOLL_CTL_ADD, listener, &event) == 0);
  }
  begin(threads, waiters);
  for (int i = 0; i < THREADS; i++) {
    clients[i] = connect_here();
    settle(i + 1);
  }
  for (int i = 0; i < THREADS; i++) {
    CHECK(pthread_join(threads[i], NULL) == 0 && close(clients[i]) == 0 && close(waiters[i].set) == 0);
  }
  CHECK(close(listener) == 0);
}

/* Level-triggered: what nobody consumes is told to all. */
static void levels(void) {
  pthread_t threads[THREADS];
  struct waiter waiters[THREADS];
  struct epoll_event event = {.events = EPOLLIN};
  int set = epoll_create1(0);
  CHECK(epoll_ctl(set, EPOLL_CTL_ADD, pair[1], &event) == 0);
  for (int i = 0; i < THREADS; i++) waiters[i] = (struct waiter){set, i};
  begin(threads, waiters);
  CHECK(send(pair[0], "x", 1, 0) == 1);
  for (int i = 0; i < THREADS; i++) CHECK(pthread_join(threads[i], NULL) == 0);
  char byte;
  CHECK(recv(pair[1], &byte, 1, 0) == 1 && close(set) == 0);
}

int main(void) {
  alarm(60);
  listener = listen_here();
  pair[0] = connect_here();
  pair[1] = accept(listener, NULL, NULL);
  CHECK(pair[1] >= 0 && close(listener) == 0 && pipe(kernel_side) == 0);
  for (int round = 0; round < ROUNDS; round++) {
    one_set(0);
    one_set(1);
    exclusive();
    levels();
  }
  puts("ok");
  return 0;
}
