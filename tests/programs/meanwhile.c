/*
 * What one thread does while another is in a call: prints what the calls of one case gave, which is the same over the
 * kernel and on a node.
 *
 *     meanwhile CASE
 */
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/uio.h>

#include "pairs.h"

static struct sockaddr_in loopback(void) {
  return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

/* ---- members that come while somebody sleeps in the set ---- */

static void kernel_member_added(void) {
  for (int nested = 0; nested < 2; nested++) {
    struct pair p = pair();
    int ends[2], set = epoll_of(p.a, -1, 1), inner = -1;
    CHECK(pipe(ends) == 0);
    struct waiter w = {.call = in_epoll, .fd = set};
    start(&w), wait_for_sleep(&w);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = 2};
    if (nested) inner = epoll_of(ends[0], -1, 3);
    CHECK(epoll_ctl(set, EPOLL_CTL_ADD, nested ? inner : ends[0], &event) == 0);
    CHECK(write(ends[1], "x", 1) == 1);
    join(&w);
    printf("%s: %ld events %x\n", nested ? "in a set of its own" : "a pipe", w.result, w.events);
  }
}

/* ---- cancelled before the call ---- */

static int cancelled_fd;
static _Atomic bool go;

static void *closes(void *argument) {
  while (!go) sched_yield();
  close(cancelled_fd);
  return argument;
}
static void *sends(void *argument) {
  while (!go) sched_yield();
  for (int i = 0; i < 100; i++) CHECK(send(cancelled_fd, "x", 1, 0) == 1);
  return argument;
}
static void *receives(void *argument) {
  char byte;
  while (!go) sched_yield();
  for (int i = 0; i < 100; i++) CHECK(recv(cancelled_fd, &byte, 1, 0) == 1);
  return argument;
}
static void *makes_sockets(void *argument) {
  while (!go) sched_yield();
  CHECK(socket(AF_INET, SOCK_STREAM, 0) >= 0);
  return argument;
}

static bool is_cancelled(void *(*what)(void *)) {
  pthread_t thread;
  void *result;
  go = false;
  CHECK(pthread_create(&thread, NULL, what, NULL) == 0 && pthread_cancel(thread) == 0);
  go = true;
  CHECK(pthread_join(thread, &result) == 0);
  return result == PTHREAD_CANCELED;
}

static void cancelled(void) {
  TELL(is_cancelled(makes_sockets)); /* the first of this process: no cancellation point */
  struct pair p = pair();
  cancelled_fd = p.a;
  for (int i = 0; i < 100; i++) CHECK(send(p.b, "x", 1, 0) == 1);
  arrives(p.a);
  TELL(is_cancelled(sends));
  TELL(is_cancelled(receives));
  TELL(is_cancelled(closes));
  TELL(close(p.a)); /* it was not: this is what a cleanup does */
  receive_all(p.b, back, 0);
  TELL(poll(&(struct pollfd){.fd = p.b, .events = POLLIN}, 1, 20000));
}

/* ---- handlers ---- */

static _Atomic int handled;
static void on_signal(int number) { (void)number, handled++; }

static size_t asked;
static long in_send(struct waiter *w) { return send(w->fd, bytes, asked, 0); }
static long in_recv_all(struct waiter *w) { return recv(w->fd, back, 100, MSG_WAITALL); }

/* A call that has moved something is ended by any handler; one that has not goes on after SA_RESTART. */
static void handlers(void) {
  for (int restart = 0; restart < 2; restart++) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = restart ? SA_RESTART : 0};
    CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
    struct pair p = pair();
    asked = ROOM;
    struct waiter w = {.call = in_send, .fd = p.a};
    start(&w), wait_for_sleep(&w);
    CHECK(pthread_kill(w.thread, SIGUSR1) == 0);
    join(&w);
    printf("send, %d: %s\n", restart, w.result > 0 && w.result < ROOM ? "a part" : "?");

    struct pair q = pair();
    CHECK(send(q.b, "hello", 5, 0) == 5);
    arrives(q.a);
    w = (struct waiter){.call = in_recv_all, .fd = q.a};
    start(&w), wait_for_sleep(&w);
    CHECK(pthread_kill(w.thread, SIGUSR1) == 0);
    join(&w);
    printf("recv, %d: %ld %.5s\n", restart, w.result, back);
  }
  struct pair p = pair();
  struct waiter w = {.call = in_recv_all, .fd = p.a};
  handled = 0;
  start(&w), wait_for_sleep(&w);
  CHECK(pthread_kill(w.thread, SIGUSR1) == 0);
  while (!handled) sched_yield();
  CHECK(send(p.b, bytes, 100, 0) == 100);
  join(&w);
  printf("recv of nothing yet: %ld\n", w.result);
}

/* ---- bytes that are thrown away ---- */

static long in_send_all(struct waiter *w) {
  size_t done = 0;
  while (done < asked) {
    ssize_t n = send(w->fd, bytes + done, asked - done, 0);
    CHECK(n > 0);
    done += (size_t)n;
  }
  return (long)done;
}

static void thrown_away(void) {
  struct pair p = pair();
  asked = 4 << 20;
  struct waiter w = {.call = in_send_all, .fd = p.a};
  start(&w);
  TELL(recv(p.b, NULL, asked, MSG_TRUNC | MSG_WAITALL));
  join(&w);
  CHECK(send(p.a, "rest", 4, 0) == 4);
  receive_all(p.b, back, 4);
  TELL(memcmp(back, "rest", 4));
}

/* ---- a connect that fails, watched since it began ---- */

static struct sockaddr_in refusing;
static long in_connect(struct waiter *w) { return connect(w->fd, (struct sockaddr *)&refusing, sizeof refusing); }

static void watched_since_connecting(void) {
  refusing = loopback();
  int listener = listening(&refusing, false);
  CHECK(listen(listener, 0) == 0);
  int first = connected(&refusing), fd = socket(AF_INET, SOCK_STREAM, 0); /* the backlog is full */
  struct waiter connects = {.call = in_connect, .fd = fd};
  start(&connects), wait_for_sleep(&connects);
  struct waiter watches = {.call = in_epoll, .fd = epoll_of(fd, -1, 5)};
  start(&watches), wait_for_sleep(&watches);
  CHECK(close(listener) == 0);
  join(&connects), join(&watches);
  printf("connect: %ld %s\n", connects.result, strerrorname_np(connects.error));
  printf("epoll_wait: %ld, tag %d, %s\n", watches.result, watches.events >> 16,
         watches.events & EPOLLHUP ? "hung up" : "?");
  close(first);
}

/* ---- numbers ---- */

/* A set that was waited on while it was empty has a descriptor of its own for a while, which goes with it. */
static void numbers(void) {
  struct rlimit limit = {1024, 1024};
  CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
  struct pair p = pair();
  int set = epoll_create1(0), null = open("/dev/null", O_RDONLY), fds[1024], count = 0, bad = 0;
  CHECK(set >= 0 && null >= 0);
  struct waiter w = {.call = in_epoll, .fd = set};
  start(&w), wait_for_sleep(&w);
  CHECK(epoll_ctl(set, EPOLL_CTL_ADD, p.a, &(struct epoll_event){.events = EPOLLOUT}) == 0);
  join(&w);
  CHECK(close(set) == 0);
  while ((fds[count] = dup(null)) >= 0) count++;
  for (int i = 0; i < count; i++) bad += close(fds[i]) < 0;
  TELL(count > 900);
  TELL(bad);
}

/* ---- options ---- */

static void low_water(void) {
  struct pair p = pair();
  int many = 100, few = 1;
  CHECK(setsockopt(p.a, SOL_SOCKET, SO_RCVLOWAT, &many, sizeof many) == 0 && send(p.b, "hello", 5, 0) == 5);
  struct waiter w = {.call = in_epoll, .fd = epoll_of(p.a, -1, 1)};
  start(&w), wait_for_sleep(&w);
  CHECK(setsockopt(p.a, SOL_SOCKET, SO_RCVLOWAT, &few, sizeof few) == 0);
  join(&w);
  printf("epoll_wait: %ld events %x\n", w.result, w.events);
}

/* ---- connections given up, and made anew, while somebody is in a call on them ---- */

static void connect_anew(int fd, struct sockaddr_in *address) {
  struct sockaddr none = {.sa_family = AF_UNSPEC};
  CHECK(connect(fd, &none, sizeof none) == 0);
  CHECK(connect(fd, (struct sockaddr *)address, sizeof *address) == 0);
}

static int told(int fd, unsigned long what) {
  int bytes = -1;
  CHECK(ioctl(fd, what, &bytes) == 0);
  return bytes;
}

static char *large;
static long in_large_recv(struct waiter *w) { return recv(w->fd, large, 1 << 20, MSG_WAITALL); }

static void given_up(void) {
  struct sockaddr_in address = loopback();
  int listener = listening(&address, false);
  static const struct {
    const char *name;
    long (*call)(struct waiter *);
  } calls[] = {{"recv", in_recv}, {"recv of much", in_large_recv}, {"poll", in_poll}};
  for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
    int fd = connected(&address), before = accept(listener, NULL, NULL);
    large = malloc(1 << 20);
    memset(large, '.', 1 << 20);
    if (calls[i].call == in_large_recv) CHECK(send(before, bytes, 300000, 0) == 300000);
    struct waiter w = {.call = calls[i].call, .fd = fd, .kernel = -1};
    start(&w), wait_for_sleep(&w);
    if (calls[i].call == in_large_recv) { /* until it sleeps because it has all */
      while (told(before, TIOCOUTQ)) sched_yield();
      while (!getenv("VMMC_REDIRECT_ORDINARY") && told(fd, FIONREAD)) sched_yield(); /* else it need not be woken */
      wait_for_sleep(&w);
    }
    connect_anew(fd, &address);
    int now = accept(listener, NULL, NULL);
    CHECK(now >= 0 && send(now, "new", 3, 0) == 3);
    join(&w);
    printf("%s: %ld %s\n", calls[i].name, w.result, w.result < 0 ? strerrorname_np(w.error) : "");
    TELL(recv(fd, back, 3, MSG_WAITALL));
    printf("%.3s, and behind what was received: %c\n", back, large[(1 << 20) - 1]);
    close(fd), close(before), close(now), free(large);
  }
}

int main(int argc, char **argv) {
  static const struct test_case cases[] = {
    CASE(kernel_member_added), CASE(cancelled), CASE(handlers), CASE(thrown_away), CASE(watched_since_connecting),
    CASE(numbers), CASE(low_water), CASE(given_up),
  };
  return run_case(argc, argv, cases, sizeof cases / sizeof *cases);
}
