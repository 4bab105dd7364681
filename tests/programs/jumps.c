/* Signal handlers that leave blocked calls by siglongjmp: the call has let go of all that it had.  The socket
 * closes, its peer sees the end, other threads are served, and the thread goes on.  The same over the kernel and
 * on a node. */
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>

#include "check.h"

static int mine, peer, extra[2], listener, epoll;
static char block[65536], stack[65536];
static sigjmp_buf back;
static _Atomic int waits;

static void jump(int number) {
  (void)number;
  siglongjmp(back, 1);
}

static void in_recv(void) { recv(mine, block, sizeof block, 0); }
static void in_recv_all(void) { recv(mine, block, sizeof block, MSG_WAITALL); }
static void in_send(void) {
  while (send(mine, block, sizeof block, 0) > 0) {
  }
}
static void in_poll(void) { poll(&(struct pollfd){.fd = mine, .events = POLLIN}, 1, -1); }
static void in_mixed_poll(void) {
  poll((struct pollfd[]){{.fd = mine, .events = POLLIN}, {.fd = extra[0], .events = POLLIN}}, 2, -1);
}
static void in_long_poll(void) {
  struct pollfd set[300];
  for (int i = 0; i < 300; i++) set[i] = (struct pollfd){.fd = i ? -1 : mine, .events = POLLIN};
  poll(set, 300, -1);
}
static void in_select(void) {
  fd_set set;
  FD_ZERO(&set);
  FD_SET(mine, &set);
  FD_SET(extra[0], &set);
  select(FD_SETSIZE, &set, NULL, NULL, NULL);
}
static void in_epoll(void) { epoll_wait(epoll, &(struct epoll_event){0}, 1, -1); }
static void in_accept(void) { accept(listener, NULL, NULL); }

/* Sends the signal once the thread is asleep. */
static pid_t sleeper;
static void *wake(void *thread) {
  char path[64], line[512];
  snprintf(path, sizeof path, "/proc/self/task/%d/stat", sleeper);
  for (int asleep = 0; asleep < 3;) {
    FILE *file = fopen(path, "r");
    CHECK(file && fgets(line, sizeof line, file));
    fclose(file);
    const char *end = strrchr(line, ')');
    asleep = atomic_load(&waits) && end && end[2] == 'S' ? asleep + 1 : 0;
    sched_yield();
  }
  CHECK(pthread_kill(*(pthread_t *)thread, SIGUSR1) == 0);
  return NULL;
}

static void leave(void (*call)(void)) {
  pthread_t self = pthread_self(), waker;
  sleeper = (pid_t)syscall(SYS_gettid);
  CHECK(pthread_create(&waker, NULL, wake, &self) == 0);
  if (!sigsetjmp(back, 1)) {
    atomic_store(&waits, 1);
    call();
    CHECK(!"a call that goes on");
  }
  atomic_store(&waits, 0);
  CHECK(pthread_join(waker, NULL) == 0);
  /* The C library's own calls are left with this as it was in them. */
  CHECK(pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, NULL) == 0);
}

static void pair(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t length = sizeof address;
  listener = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 5) == 0);
  CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
  mine = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(connect(mine, (struct sockaddr *)&address, length) == 0);
  peer = accept(listener, NULL, NULL);
  CHECK(peer >= 0);
}

/* The last hold on the socket is its descriptor: without it the connection ends. */
static void check_end(void) {
  CHECK(send(peer, "on", 2, 0) == 2 && recv(mine, block, 2, MSG_WAITALL) == 2 && !memcmp(block, "on", 2));
  CHECK(close(mine) == 0 && close(listener) == 0);
  ssize_t length;
  do CHECK((length = recv(peer, block, sizeof block, 0)) >= 0);
  while (length);
  CHECK(close(peer) == 0);
}

/* A handler may also jump within itself, in the middle of a call that goes on. */
static volatile sig_atomic_t jumped;
static void jump_within(int number) {
  (void)number;
  jmp_buf here;
  struct pollfd none = {.fd = mine, .events = POLLIN};
  CHECK(poll(&none, 1, 0) == 0);
  if (!setjmp(here)) longjmp(here, 1);
  jumped = 1;
  CHECK(send(peer, "x", 1, 0) == 1);
}
static void stay(int flags) {
  pthread_t self = pthread_self(), waker;
  struct sigaction action = {.sa_handler = jump_within, .sa_flags = flags | SA_RESTART};
  jumped = 0;
  pair();
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
  CHECK(pthread_create(&waker, NULL, wake, &self) == 0);
  atomic_store(&waits, 1);
  CHECK(recv(mine, block, 1, 0) == 1 && jumped);
  atomic_store(&waits, 0);
  CHECK(pthread_join(waker, NULL) == 0);
  check_end();
}

int main(void) {
  alarm(60);
  CHECK(pipe(extra) == 0);
  CHECK(sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = sizeof stack}, NULL) == 0);
  static void (*const calls[])(void) = {in_recv, in_recv_all, in_send,   in_poll,  in_mixed_poll,
                                        in_long_poll, in_select, in_accept, in_epoll, in_epoll};
  enum { CALLS = sizeof calls / sizeof *calls };
  for (int i = 0; i < 2 * CALLS; i++) {
    struct sigaction action = {.sa_handler = jump, .sa_flags = i < CALLS ? 0 : SA_ONSTACK};
    CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
    pair();
    epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, mine, &event) == 0);
    if (i % CALLS == CALLS - 1) CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, extra[0], &event) == 0);
    leave(calls[i % CALLS]);
    check_end();
    CHECK(close(epoll) == 0);
  }
  stay(0);
  stay(SA_ONSTACK);
  puts("ok");
  return 0;
}
