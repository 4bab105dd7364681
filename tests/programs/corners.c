/*
 * Corners of stream sockets: prints what the calls of one case gave, which is the same over the kernel and on a node.
 *
 *     corners CASE
 */
#include <limits.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

#include "pairs.h"

/* ---- descriptors closed and given to others while a thread is asleep on them ---- */

static void closed_while_asleep(void) {
  static const struct {
    const char *name;
    long (*call)(struct waiter *);
  } calls[] = {{"recv", in_recv}, {"poll", in_poll}, {"select", in_select}};
  int quiet[2];
  CHECK(pipe(quiet) == 0);
  for (int mixed = 0; mixed < 2; mixed++)
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
      for (int replaced = 0; replaced < 2; replaced++) {
        struct pair p = pair(), other = pair();
        struct waiter w = {.call = calls[i].call, .fd = p.a, .kernel = mixed ? quiet[0] : -1};
        start(&w), wait_for_sleep(&w);
        if (replaced) CHECK(dup2(other.a, p.a) == p.a && send(other.b, "o", 1, 0) == 1);
        else CHECK(close(p.a) == 0);
        CHECK(send(p.b, "x", 1, 0) == 1);
        join(&w);
        printf("%s%s, %s: %ld %s events %x byte %c\n", calls[i].name, mixed ? " with a pipe" : "",
               replaced ? "replaced" : "closed", w.result, w.result < 0 ? strerrorname_np(w.error) : "", w.events,
               w.byte ? w.byte : '-');
        if (w.call == in_recv) TELL(recv(p.b, back, 1, 0)); /* the end, once the sleeper is gone */
        if (replaced) TELL(recv(p.a, back, 10, 0));
        if (replaced) CHECK(close(p.a) == 0);
        CHECK(close(p.b) == 0 && close(other.a) == 0 && close(other.b) == 0);
      }
}

static void closed_while_accepting(void) {
  for (int replaced = 0; replaced < 2; replaced++) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct pair other = pair();
    struct waiter w = {.call = in_accept, .fd = listening(&address, false)};
    start(&w), wait_for_sleep(&w);
    if (replaced) CHECK(dup2(other.a, w.fd) == w.fd);
    else CHECK(close(w.fd) == 0);
    int client = connected(&address);
    join(&w);
    TELL(w.result);
    TELL(recv(client, back, 1, 0));
    int late = socket(AF_INET, SOCK_STREAM, 0);
    TELL(connect(late, (struct sockaddr *)&address, sizeof address)); /* nobody listens any more */
  }
}

static void closed_in_epoll(void) {
  int quiet[2];
  CHECK(pipe(quiet) == 0);
  for (int mixed = 0; mixed < 2; mixed++) {
    int kernel = mixed ? quiet[0] : -1;
    /* the last descriptor of a member goes: it is no member any more; another comes and tells */
    struct pair p = pair(), other = pair();
    struct waiter w = {.call = in_epoll, .fd = epoll_of(p.a, kernel, 1)};
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = 2};
    start(&w), wait_for_sleep(&w);
    CHECK(dup2(other.a, p.a) == p.a && send(p.b, "x", 1, MSG_NOSIGNAL) == 1);
    CHECK(send(other.b, "o", 1, 0) == 1);
    CHECK(epoll_ctl(w.fd, EPOLL_CTL_ADD, p.a, &event) == 0);
    join(&w);
    printf("reused: %ld events %x\n", w.result, w.events);
    CHECK(close(w.fd) == 0);

    /* a duplicate keeps it a member, and the number stands for both */
    p = pair(), other = pair();
    w = (struct waiter){.call = in_epoll, .fd = epoll_of(p.a, kernel, 3)};
    start(&w), wait_for_sleep(&w);
    int copy = dup(p.a);
    CHECK(copy >= 0 && dup2(other.a, p.a) == p.a);
    CHECK(send(p.b, "x", 1, 0) == 1);
    join(&w);
    printf("kept by a duplicate: %ld events %x\n", w.result, w.events);
    TELL(epoll_ctl(w.fd, EPOLL_CTL_DEL, p.a, &event));
    TELL(epoll_ctl(w.fd, EPOLL_CTL_ADD, p.a, &event));
    TELL(epoll_wait(w.fd, &event, 1, 0));
    TELL(event.data.u32);
    CHECK(close(copy) == 0);
    TELL(epoll_wait(w.fd, &event, 1, 0));
    CHECK(send(other.b, "o", 1, 0) == 1);
    arrives(other.a);
    TELL(epoll_wait(w.fd, &event, 1, 20000));
    TELL(event.data.u32);
    CHECK(close(w.fd) == 0);

    /* the set itself is closed, and its number another file's */
    p = pair();
    w = (struct waiter){.call = in_epoll, .fd = epoll_of(p.a, kernel, 4)};
    start(&w), wait_for_sleep(&w);
    CHECK(dup2(quiet[1], w.fd) == w.fd);
    CHECK(send(p.b, "x", 1, 0) == 1);
    join(&w);
    printf("a set that is closed: %ld %s events %x\n", w.result, w.result < 0 ? strerrorname_np(w.error) : "", w.events);
    CHECK(close(w.fd) == 0);
  }
}

/* ---- select beyond FD_SETSIZE ---- */

enum { WORDS = 4096 / (8 * sizeof(long)) };
typedef unsigned long large_set[WORDS];
static void set_bit(unsigned long *set, int fd) { set[(size_t)fd / 64] |= 1ul << fd % 64; }
static bool has_bit(const unsigned long *set, int fd) { return set[(size_t)fd / 64] >> fd % 64 & 1; }

static int large_select(large_set in, large_set out, large_set except, long seconds) {
  struct timeval limit = {.tv_sec = seconds};
  return select(4096, (fd_set *)(void *)in, (fd_set *)(void *)out, (fd_set *)(void *)except, seconds < 0 ? NULL : &limit);
}

static long in_large_select(struct waiter *w) {
  large_set in = {0};
  set_bit(in, w->fd), set_bit(in, w->kernel);
  long result = large_select(in, NULL, NULL, -1);
  w->events = has_bit(in, w->fd) + 2 * has_bit(in, w->kernel);
  return result;
}

static void large_numbers(void) {
  struct rlimit limit;
  CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
  if (limit.rlim_cur < 4096) limit.rlim_cur = 4096;
  CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
  struct pair p = pair();
  int ends[2], high = fcntl(p.a, F_DUPFD, 3000), pipe_high, beyond = fcntl(p.a, F_DUPFD, 1023);
  CHECK(high == 3000 && beyond == 1023 && pipe(ends) == 0);
  CHECK((pipe_high = fcntl(ends[0], F_DUPFD, 4095)) == 4095);
  large_set in = {0}, out = {0}, except = {0};
  set_bit(in, high), set_bit(in, pipe_high), set_bit(in, beyond), set_bit(out, high), set_bit(except, high);
  TELL(large_select(in, out, except, 0));
  printf("%d%d%d %d%d\n", has_bit(in, high), has_bit(in, pipe_high), has_bit(in, beyond), has_bit(out, high),
         has_bit(except, high));
  CHECK(send(p.b, "x", 1, 0) == 1);
  arrives(p.a);
  memset(out, 0, sizeof out);
  set_bit(in, high), set_bit(in, pipe_high), set_bit(in, beyond);
  TELL(large_select(in, out, NULL, -1));
  printf("%d%d%d %d\n", has_bit(in, high), has_bit(in, pipe_high), has_bit(in, beyond), has_bit(out, high));
  CHECK(recv(high, back, 10, 0) == 1);
  for (int by_pipe = 0; by_pipe < 2; by_pipe++) {
    struct waiter w = {.call = in_large_select, .fd = high, .kernel = pipe_high};
    start(&w), wait_for_sleep(&w);
    CHECK(by_pipe ? write(ends[1], "x", 1) == 1 : send(p.b, "x", 1, 0) == 1);
    join(&w);
    printf("woken: %ld events %d\n", w.result, w.events);
    CHECK(recv(high, back, 10, MSG_DONTWAIT) == (by_pipe ? -1 : 1));
  }
  memset(in, 0, sizeof in);
  set_bit(in, 2000), set_bit(in, high); /* one that is not open */
  TELL(large_select(in, NULL, NULL, 0));
}

/* ---- SO_LINGER that waits ---- */

static long in_close(struct waiter *w) { return close(w->fd); }

static double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Reads what is left of a stream: all that was sent, then the end. */
static void check_rest(int fd, size_t length) {
  receive_all(fd, back, length);
  CHECK(memcmp(back, bytes, length) == 0);
  CHECK(recv(fd, back, 1, 0) == 0);
}

static void lingers(void) {
  for (int by_shutdown = 0; by_shutdown < 2; by_shutdown++)
    for (int nonblocking = 0; nonblocking < 2; nonblocking++) {
      struct pair p = pair();
      struct linger linger = {.l_onoff = 1, .l_linger = 100};
      CHECK(setsockopt(p.a, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
      size_t length = fill(p.a);
      CHECK(fcntl(p.a, F_SETFL, nonblocking ? O_NONBLOCK : 0) == 0);
      if (by_shutdown) TELL(shutdown(p.a, SHUT_WR)); /* does not wait */
      struct waiter w = {.call = in_close, .fd = p.a};
      start(&w), wait_for_sleep(&w);
      check_rest(p.b, length);
      join(&w);
      TELL(w.result);
      CHECK(close(p.b) == 0);
    }
}

static void lingers_in_vain(void) {
  struct pair p = pair();
  struct linger linger = {.l_onoff = 1, .l_linger = 1};
  CHECK(setsockopt(p.a, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
  size_t length = fill(p.a);
  double before = now_s();
  TELL(close(p.a));
  CHECK(now_s() - before > 0.9);
  check_rest(p.b, length); /* what was written is delivered all the same */
  /* nothing to wait for: what the peer's buffer has is delivered, read or not */
  p = pair();
  linger.l_linger = 100;
  CHECK(setsockopt(p.a, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
  CHECK(send(p.a, bytes, 1000, 0) == 1000);
  TELL(close(p.a));
  check_rest(p.b, 1000);
}

/* ---- very many pieces ---- */

static ssize_t with_message(bool sends, int fd, struct iovec *pieces, size_t count, int flags) {
  struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
  return sends ? sendmsg(fd, &message, flags) : recvmsg(fd, &message, flags);
}

/* `count` pieces of many lengths, every third of them empty, of which some are nowhere. */
static size_t cut(struct iovec *pieces, size_t count, char *at) {
  size_t length = 0;
  for (size_t i = 0; i < count; i++) {
    size_t piece = i % 3 ? 1 + i * 7 % 61 : 0;
    pieces[i] = (struct iovec){i % 9 ? at + length : NULL, piece};
    length += piece;
  }
  return length;
}

/* Until so much has arrived and nobody has read it. */
static void all_arrives(int fd, size_t length) {
  int waiting;
  do CHECK(ioctl(fd, FIONREAD, &waiting) == 0);
  while ((size_t)waiting < length && sched_yield() == 0);
}

static void many_pieces(void) {
  static struct iovec out[IOV_MAX + 1], in[IOV_MAX + 1];
  static const size_t counts[] = {0, 1, 2, 300, IOV_MAX - 1, IOV_MAX};
  struct pair p = pair();
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
    for (int kind = 0; kind < 3; kind++) {
      size_t count = counts[i], length = cut(out, count, bytes);
      cut(in, count, back);
      memset(back, 0, length + 1);
      ssize_t put = kind == 0   ? with_message(true, p.a, out, count, 0)
                    : kind == 1 ? writev(p.a, out, (int)count)
                                : pwritev2(p.a, out, (int)count, -1, 0);
      TELL(put);
      all_arrives(p.b, length);
      if (!length && kind != 1) continue; /* a receive of nothing would wait */
      ssize_t got = kind == 0   ? with_message(false, p.b, in, count, 0)
                    : kind == 1 ? readv(p.b, in, (int)count)
                                : preadv2(p.b, in, (int)count, -1, 0);
      TELL(got);
      CHECK(memcmp(bytes, back, length) == 0 && !back[length]);
    }
  cut(out, IOV_MAX + 1, bytes);
  TELL(with_message(true, p.a, out, IOV_MAX + 1, 0));
  TELL(with_message(false, p.b, out, IOV_MAX + 1, MSG_DONTWAIT));
  TELL(with_message(true, p.a, out, SIZE_MAX, 0));
  TELL(writev(p.a, out, IOV_MAX + 1));
  TELL(readv(p.b, out, IOV_MAX + 1));
  TELL(pwritev2(p.a, out, IOV_MAX + 1, -1, 0));
  TELL(pwritev2(p.a, out, 2, 0, 0)); /* at a position: there is none */
  TELL(preadv2(p.b, out, 2, 0, 0));
  TELL(pwritev(p.a, out, 2, 0));
  TELL(preadv(p.b, out, 2, 0));
  TELL(pwrite(p.a, bytes, 2, 0));
  TELL(pread(p.b, back, 2, 0));
  TELL(recv(p.b, back, 1, MSG_DONTWAIT));
  for (size_t i = 0; i < IOV_MAX; i++) out[i] = (struct iovec){NULL, 0};
  TELL(with_message(true, p.a, out, IOV_MAX, 0));
  TELL(writev(p.a, out, IOV_MAX));
  TELL(readv(p.b, out, IOV_MAX));
  out[IOV_MAX - 1] = (struct iovec){bytes, SIZE_MAX};
  TELL(with_message(true, p.a, out, IOV_MAX, 0));
  TELL(recv(p.b, back, 1, MSG_DONTWAIT));
}

/* ---- several messages a call, in both directions ---- */

static void many_messages(void) {
  enum { MESSAGES = 20 };
  struct pair p = pair();
  struct iovec pieces[MESSAGES];
  struct mmsghdr messages[MESSAGES] = {0};
  size_t length = 0;
  for (int i = 0; i < MESSAGES; i++) {
    pieces[i] = (struct iovec){bytes + length, (size_t)i * 10};
    messages[i].msg_hdr = (struct msghdr){.msg_iov = &pieces[i], .msg_iovlen = 1};
    length += pieces[i].iov_len;
  }
  TELL(sendmmsg(p.a, messages, MESSAGES, 0));
  for (int i = 0; i < MESSAGES; i++) printf("%u ", messages[i].msg_len);
  all_arrives(p.b, length);
  for (int i = 0; i < MESSAGES; i++) pieces[i] = (struct iovec){back + i * 200, 150}, messages[i].msg_len = 0;
  TELL(recvmmsg(p.b, messages, MESSAGES, MSG_WAITFORONE, NULL));
  for (int i = 0; i < MESSAGES; i++) printf("%u ", messages[i].msg_len);
  for (size_t at = 0; at < length; at++) CHECK(back[at / 150 * 200 + at % 150] == bytes[at]);
  TELL(recvmmsg(p.b, messages, MESSAGES, MSG_DONTWAIT, NULL));
  CHECK(send(p.a, bytes, 300, 0) == 300);
  all_arrives(p.b, 300);
  TELL(recvmmsg(p.b, messages, 1, 0, NULL));
  TELL(recvmmsg(p.b, messages, 1, 0, &(struct timespec){0, 0}));
  TELL(recvmmsg(p.b, messages, 0, 0, NULL));
  TELL(recvmmsg(p.b, messages, 1, 0, &(struct timespec){0, -1}));
  TELL(sendmmsg(p.a, messages, 0, 0));
  messages[2].msg_hdr.msg_iovlen = IOV_MAX + 1; /* those before it are sent */
  TELL(sendmmsg(p.a, messages, MESSAGES, 0));
  messages[0].msg_hdr.msg_iovlen = IOV_MAX + 1;
  TELL(sendmmsg(p.a, messages, MESSAGES, 0));
  all_arrives(p.b, 300);
  CHECK(shutdown(p.a, SHUT_WR) == 0);
  messages[0].msg_hdr.msg_iovlen = messages[2].msg_hdr.msg_iovlen = 1;
  TELL(recvmmsg(p.b, messages, 2, 0, NULL));
  TELL(recvmmsg(p.b, messages, 3, 0, NULL)); /* the end */
  TELL(messages[0].msg_len);
}

/* ---- files and pipes ---- */

/* What a call that does not wait has moved. */
static size_t some(ssize_t n) {
  bool is_late = n < 0 && errno == EAGAIN;
  CHECK(n >= 0 || is_late);
  return n > 0 ? (size_t)n : 0;
}

static void files(void) {
  enum { LENGTH = 300000 };
  struct pair p = pair();
  int file = memfd_create("corners", MFD_CLOEXEC), ends[2];
  CHECK(file >= 0 && write(file, bytes, LENGTH) == LENGTH && pipe(ends) == 0);
  off_t at = 1000;
  TELL(sendfile(p.a, file, &at, 5000));
  TELL(at);
  TELL(lseek(file, 0, SEEK_CUR));
  CHECK(lseek(file, 7, SEEK_SET) == 7);
  TELL(sendfile(p.a, file, NULL, 70));
  TELL(lseek(file, 0, SEEK_CUR));
  at = LENGTH - 10;
  TELL(sendfile(p.a, file, &at, 5000));
  TELL(sendfile(p.a, file, &at, 5000));
  receive_all(p.b, back, 5080);
  CHECK(!memcmp(back, bytes + 1000, 5000) && !memcmp(back + 5000, bytes + 7, 70) &&
        !memcmp(back + 5070, bytes + LENGTH - 10, 10));
  TELL(sendfile(file, p.a, NULL, 10));
  TELL(sendfile(p.a, p.b, NULL, 10));
  TELL(copy_file_range(file, NULL, p.a, NULL, 10, 0));
  TELL(copy_file_range(p.a, NULL, file, NULL, 10, 0));

  TELL(splice(file, NULL, p.a, NULL, 10, 0)); /* neither is a pipe */
  TELL(splice(p.a, NULL, p.b, NULL, 10, 0));
  loff_t place = 0;
  TELL(splice(p.b, &place, ends[1], NULL, 10, SPLICE_F_NONBLOCK)); /* a socket has no positions */
  TELL(splice(ends[0], NULL, p.a, &place, 10, SPLICE_F_NONBLOCK));
  TELL(splice(p.b, NULL, ends[1], NULL, 0, 0));
  TELL(splice(p.b, NULL, ends[0], NULL, 10, 0)); /* the wrong end */
  TELL(splice(ends[1], NULL, p.a, NULL, 10, 0));
  CHECK(fcntl(p.b, F_SETFL, O_NONBLOCK) == 0); /* SPLICE_F_NONBLOCK is of the pipe */
  TELL(splice(p.b, NULL, ends[1], NULL, 10, SPLICE_F_NONBLOCK));
  TELL(splice(p.b, NULL, ends[1], NULL, 10, 0));
  CHECK(fcntl(p.b, F_SETFL, 0) == 0);
  TELL(splice(ends[0], NULL, p.a, NULL, 10, SPLICE_F_NONBLOCK));
  CHECK(write(ends[1], bytes, 3000) == 3000);
  TELL(splice(ends[0], NULL, p.a, NULL, 2000, SPLICE_F_MORE));
  TELL(splice(ends[0], NULL, p.a, NULL, 100000, 0));
  all_arrives(p.b, 3000);
  TELL(splice(p.b, NULL, ends[1], NULL, 100, 0));
  TELL(splice(p.b, NULL, ends[1], NULL, 100000, SPLICE_F_MOVE));
  CHECK(read(ends[0], back, 3000) == 3000 && memcmp(bytes, back, 3000) == 0);
  /* A relay through a pipe, which is far smaller than what goes through it. */
  struct pair q = pair();
  size_t sent = 0, in_pipe = 0, got = 0;
  CHECK(fcntl(p.b, F_SETFL, O_NONBLOCK) == 0 && fcntl(q.a, F_SETFL, O_NONBLOCK) == 0);
  while (got < LENGTH) {
    sent += some(send(p.a, bytes + sent, LENGTH - sent < 50000 ? LENGTH - sent : 50000, MSG_DONTWAIT));
    in_pipe += some(splice(p.b, NULL, ends[1], NULL, LENGTH, SPLICE_F_NONBLOCK));
    if (in_pipe) in_pipe -= some(splice(ends[0], NULL, q.a, NULL, in_pipe, SPLICE_F_NONBLOCK));
    got += some(recv(q.b, back + got, LENGTH - got, MSG_DONTWAIT));
  }
  CHECK(memcmp(bytes, back, LENGTH) == 0);
  CHECK(fcntl(p.b, F_SETFL, 0) == 0 && fcntl(q.a, F_SETFL, 0) == 0 && close(p.a) == 0);
  TELL(splice(p.b, NULL, ends[1], NULL, 10, 0)); /* the end */
  CHECK(shutdown(q.a, SHUT_WR) == 0 && write(ends[1], "x", 1) == 1);
  signal(SIGPIPE, SIG_IGN);
  TELL(splice(ends[0], NULL, q.a, NULL, 1, 0));
}

/* ---- listeners that share a port ---- */

enum { SHARERS = 70 };

static int accept_now(int listener) {
  CHECK(fcntl(listener, F_SETFL, O_NONBLOCK) == 0);
  return accept(listener, NULL, NULL);
}

static void shared_port(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int listeners[SHARERS], accepted[SHARERS] = {0}, all = 0, alone = socket(AF_INET, SOCK_STREAM, 0);
  for (int i = 0; i < SHARERS; i++) listeners[i] = listening(&address, true);
  TELL(bind(alone, (struct sockaddr *)&address, sizeof address));
  int serving = 0, clients = 0;
  for (; serving < SHARERS && clients < 5000; clients++) {
    int client = connected(&address), server = -1;
    for (int i = 0; server < 0; i = (i + 1) % SHARERS) {
      server = accept_now(listeners[i]);
      if (server >= 0 && !accepted[i]++) serving++;
    }
    CHECK(send(server, "x", 1, 0) == 1 && recv(client, back, 1, 0) == 1);
    CHECK(close(client) == 0 && close(server) == 0);
  }
  TELL(serving);

  /* What a listener that closes has not accepted is reset, and of it nothing is handed over; the others go on. */
  enum { CLIENTS = 30 };
  for (int i = 3; i < SHARERS; i++) CHECK(close(listeners[i]) == 0);
  int client[CLIENTS], reset = 0;
  for (int i = 0; i < CLIENTS; i++) client[i] = connected(&address);
  CHECK(close(listeners[0]) == 0);
  for (int i = 1; i < 3; i++)
    for (int server; (server = accept_now(listeners[i])) >= 0; all++)
      CHECK(send(server, "x", 1, 0) == 1 && shutdown(server, SHUT_WR) == 0);
  for (int i = 0; i < CLIENTS; i++) {
    ssize_t n = recv(client[i], back, 1, 0);
    bool was_reset = n < 0 && errno == ECONNRESET;
    CHECK(n == 1 || was_reset);
    reset += was_reset;
  }
  TELL(reset > 0);
  TELL(all > 0);
  TELL(all + reset);
  CHECK(close(listeners[1]) == 0);
  for (int i = 0; i < CLIENTS; i++) CHECK(connected(&address) >= 0);
  all = 0;
  while (accept_now(listeners[2]) >= 0) all++;
  TELL(all);
  CHECK(close(listeners[2]) == 0);
  int late = socket(AF_INET, SOCK_STREAM, 0);
  TELL(connect(late, (struct sockaddr *)&address, sizeof address));
}

/* ---- one thread sends, a second receives, a third ends it ---- */

static long in_send(struct waiter *w) { return send(w->fd, bytes, ROOM, MSG_NOSIGNAL); }

static void ended_by_a_third(void) {
  static const char *ends[] = {"close", "shutdown", "shutdown of reading", "shutdown of writing"};
  for (int how = 0; how < 4; how++) {
    struct pair p = pair();
    struct waiter sender = {.call = in_send, .fd = p.a}, receiver = {.call = in_recv, .fd = p.a};
    start(&receiver), start(&sender);
    wait_for_sleep(&receiver), wait_for_sleep(&sender);
    printf("%s: %d\n", ends[how], how == 0 ? close(p.a) : shutdown(p.a, how == 1 ? SHUT_RDWR : how == 2 ? SHUT_RD : SHUT_WR));
    if (how == 0 || how == 3) CHECK(send(p.b, "x", 1, 0) == 1); /* reading goes on */
    join(&receiver);
    printf("receiver: %ld %s\n", receiver.result, receiver.result < 0 ? strerrorname_np(receiver.error) : "");
    size_t got = 0; /* what had been taken arrives, then the end; all of it where nothing ended the sender */
    if (how == 2) {
      receive_all(p.b, back, got = ROOM);
      CHECK(shutdown(p.a, SHUT_WR) == 0);
    }
    for (ssize_t n; (n = recv(p.b, back + got, ROOM - got, 0)) > 0 && got < ROOM;) got += (size_t)n;
    join(&sender);
    printf("sender: %s, what it was told arrived: %d\n", sender.result == ROOM ? "all" : sender.result > 0 ? "part" : "none",
           (size_t)sender.result == got && !memcmp(bytes, back, got));
    TELL(recv(p.b, back, 1, 0));
    CHECK(how == 0 || close(p.a) == 0);
    CHECK(close(p.b) == 0);
  }
}

struct race {
  int fd;
  _Atomic bool over;
};
static void *race_send(void *argument) {
  struct race *r = argument;
  while (send(r->fd, bytes, 100000, MSG_NOSIGNAL) > 0)
    if (r->over) break;
  return NULL;
}
static void *race_receive(void *argument) {
  struct race *r = argument;
  static _Thread_local char into[1000];
  while (recv(r->fd, into, sizeof into, 0) > 0) {
  }
  return NULL;
}
static void *race_echo(void *argument) {
  struct race *r = argument;
  static _Thread_local char into[50000];
  for (ssize_t n; (n = recv(r->fd, into, sizeof into, 0)) > 0;)
    (void)send(r->fd, into, 10, MSG_NOSIGNAL);
  return NULL;
}

static void ended_in_a_race(void) {
  for (int round = 0; round < 20; round++) {
    struct pair p = pair();
    struct race near = {.fd = p.a}, far = {.fd = p.b};
    pthread_t threads[3];
    void *(*runs[])(void *) = {race_send, race_receive, race_echo};
    for (int i = 0; i < 3; i++) CHECK(pthread_create(&threads[i], NULL, runs[i], i == 2 ? &far : &near) == 0);
    for (int i = 0; i < round * 6; i++) sched_yield();
    near.over = true;
    if (round % 2) CHECK(shutdown(p.a, SHUT_RDWR) == 0);
    CHECK(close(p.a) == 0);
    if (round % 2 == 0) shutdown(p.b, SHUT_WR); /* a receiver that is still in its call hears of that; else it is reset */
    for (int i = 0; i < 3; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(close(p.b) == 0);
  }
}

/* ---- more sleepers on sockets and kernel descriptors than a node has words for ---- */

static void many_sleepers(void) {
  enum { SLEEPERS = 90 };
  static struct waiter w[SLEEPERS];
  static struct pair p[SLEEPERS];
  static int ends[SLEEPERS][2];
  for (int by_pipe = 0; by_pipe < 2; by_pipe++) {
    for (int i = 0; i < SLEEPERS; i++) {
      p[i] = pair();
      CHECK(pipe(ends[i]) == 0);
      w[i] = (struct waiter){.call = i % 3 == 0 ? in_poll : i % 3 == 1 ? in_select : in_epoll, .fd = p[i].a, .kernel = ends[i][0]};
      if (i % 3 == 2) w[i].fd = epoll_of(p[i].a, ends[i][0], 9);
      start(&w[i]);
    }
    for (int i = 0; i < SLEEPERS; i++) wait_for_sleep(&w[i]);
    for (int i = 0; i < SLEEPERS; i++) {
      int n = (i + 45) % SLEEPERS, pipe_first = (n % 2) ^ by_pipe;
      CHECK(pipe_first ? write(ends[n][1], "x", 1) == 1 : send(p[n].b, "x", 1, 0) == 1);
      join(&w[n]);
      printf("%d: %ld %x\n", n, w[n].result, w[n].events);
    }
    for (int i = 0; i < SLEEPERS; i++) {
      if (i % 3 == 2) CHECK(close(w[i].fd) == 0);
      CHECK(close(p[i].a) == 0 && close(p[i].b) == 0 && close(ends[i][0]) == 0 && close(ends[i][1]) == 0);
    }
  }
}

/* ---- stdio ---- */

static void streams(void) {
  enum { LENGTH = 200000 };
  struct pair p = pair();
  FILE *in = fdopen(dup(p.a), "r"), *out = fdopen(p.a, "w");
  CHECK(in && out);
  TELL(fileno(out) == p.a);
  TELL(fdopen(p.b, "q") == NULL);
  TELL(fseek(out, 0, SEEK_SET));
  TELL(fseek(in, 10, SEEK_CUR));
  TELL(ftell(in));
  TELL(ftell(out));
  TELL(fprintf(out, "a %s of %d\n", "line", 7));
  TELL(recv(p.b, back, 100, MSG_DONTWAIT)); /* still in the buffer */
  TELL(fflush(out));
  all_arrives(p.b, 12);
  TELL(recv(p.b, back, 100, 0));
  printf("%.12s", back);
  CHECK(setvbuf(out, NULL, _IOLBF, 100) == 0);
  TELL(fputs("one\ntwo", out));
  all_arrives(p.b, 4);
  TELL(fflush(out));
  all_arrives(p.b, 7);
  TELL(recv(p.b, back, 100, 0));

  CHECK(send(p.b, "first\nsecond 42 0x1f\nlast", 25, 0) == 25);
  char *line = NULL, word[20];
  size_t room = 0;
  int number, hex;
  TELL(getline(&line, &room, in));
  TELL(fscanf(in, "%19s %d %x", word, &number, &hex));
  printf("%s%s %d %d\n", line, word, number, hex);
  free(line);
  TELL(fgetc(in));
  TELL(ungetc('L', in));
  TELL(shutdown(p.b, SHUT_WR));
  TELL(fgets(back, 100, in) == back && !strcmp(back, "Llast"));
  TELL(fgetc(in));
  TELL(feof(in));
  TELL(ferror(in));
  TELL(fclose(in));
  TELL(fclose(out));
  TELL(send(p.a, "x", 1, 0));
  TELL(recv(p.b, back, 1, 0));
  CHECK(close(p.b) == 0);

  /* one stream for both, of which the program says when it turns around */
  p = pair();
  FILE *both = fdopen(p.a, "r+");
  CHECK(both && send(p.b, "question\n", 9, 0) == 9);
  TELL(fgets(back, 100, both) == back);
  TELL(fputs("answer\n", both));
  TELL(fflush(both));
  TELL(ferror(both));
  all_arrives(p.b, 7);
  TELL(recv(p.b, back, 100, 0));
  TELL(fclose(both));
  TELL(recv(p.b, back, 1, 0));

  /* very many bytes both ways, through small buffers; then a peer that has gone, an empty non-blocking socket */
  p = pair();
  out = fdopen(p.a, "w"), in = fdopen(p.b, "r");
  setvbuf(out, NULL, _IOFBF, 777), setvbuf(in, NULL, _IOFBF, 555);
  for (size_t put = 0, got = 0; got < LENGTH; put += 5000, got += 5000)
    CHECK(fwrite(bytes + put, 1, 5000, out) == 5000 && fflush(out) == 0 && fread(back + got, 1, 5000, in) == 5000);
  CHECK(memcmp(bytes, back, LENGTH) == 0);
  CHECK(fcntl(p.b, F_SETFL, O_NONBLOCK) == 0);
  TELL(fgetc(in));
  TELL(ferror(in) != 0);
  clearerr(in);
  signal(SIGPIPE, SIG_IGN);
  CHECK(fputc('x', out) == 'x' && shutdown(p.a, SHUT_WR) == 0);
  TELL(fflush(out));
  TELL(ferror(out) != 0);
  TELL(fputc('y', out));
  TELL(fclose(out));
  TELL(fclose(in));
}

/* ---- sockets that are standard input and output ---- */

static void over_stdio(void) {
  printf("before: %d\n", getchar()); /* which reads all that there is */
  CHECK(fflush(stdout) == 0);
  struct pair p = pair();
  int saved_in = dup(0), saved_out = dup(1);
  CHECK(dup2(p.a, 0) == 0 && dup2(p.a, 1) == 1 && close(p.a) == 0);
  CHECK(send(p.b, "name 17\nrest of it\n", 19, 0) == 19);
  char word[20], line[40], early[40];
  bool had_more = fgets(early, sizeof early, stdin) == early;
  int number, in_scanf = scanf("%19s %d\n", word, &number);
  char *got = fgets(line, sizeof line, stdin);
  int put = puts("by puts"), printed = printf("by printf %s %d %d\n", word, number, in_scanf);
  putchar('c');
  int flushed = fflush(stdout);
  ssize_t written = write(1, "by write\n", 9);
  setvbuf(stdout, NULL, _IOLBF, 0);
  fprintf(stdout, "a line\n");
  CHECK(send(p.b, "raw", 3, 0) == 3);
  ssize_t raw = read(0, line + 20, 3);
  printf("left in the buffer");
  bool is_same_number = fileno(stdin) == 0 && fileno(stdout) == 1;
  CHECK(fflush(stdout) == 0);
  CHECK(dup2(saved_in, 0) == 0 && dup2(saved_out, 1) == 1);
  printf("early: %s", had_more ? early : "none\n");
  printf("back: %s, %d %d %d %zd %zd %d\n", got ? line : "nothing\n", put > 0, printed, flushed, written, raw, is_same_number);
  size_t length = 0;
  for (ssize_t n; (n = recv(p.b, back + length, 1000, 0)) > 0;) length += (size_t)n;
  printf("the peer got: %.*s\n", (int)length, back);
}

/* ---- programs that close all they have ---- */

static void check_new_pair(void) {
  struct pair p = pair();
  CHECK(send(p.a, "x", 1, 0) == 1 && recv(p.b, back, 1, 0) == 1);
  int set = epoll_of(p.a, -1, 1), ends[2];
  struct epoll_event event;
  CHECK(pipe(ends) == 0 && send(p.b, "y", 1, 0) == 1 && epoll_wait(set, &event, 1, 20000) == 1);
  struct waiter w = {.call = in_poll, .fd = p.b, .kernel = ends[0]};
  start(&w), wait_for_sleep(&w);
  CHECK(send(p.a, "z", 1, 0) == 1);
  join(&w);
  CHECK(w.result == 1 && w.events == POLLIN);
}

static void all_closed(void) {
  for (int how = 0; how < 5; how++) {
    check_new_pair();
    struct pair p = pair();
    int last = p.b > p.a ? p.b : p.a;
    switch (how) {
      case 0: TELL(close_range(3, ~0u, 0)); break;
      case 1: closefrom(3); break;
      case 2:
        for (int fd = 3; fd < 1024; fd++) close(fd);
        break;
      case 3:
        for (int fd = 65535; fd > 2; fd--) close(fd);
        break;
      case 4: TELL(close_range(3, ~0u, CLOSE_RANGE_CLOEXEC)); break;
    }
    TELL(send(p.a, "x", 1, 0));
    TELL(fcntl(p.b, F_GETFD));
    TELL(fcntl(last, F_GETFL) == (how < 4 ? -1 : O_RDWR));
    check_new_pair();
  }
  int first = open("/dev/null", O_RDWR);
  CHECK(fflush(stdout) == 0);
  /* as a daemon begins: with none of the standard ones; what goes wrong from here on is told by the status */
  int copy = dup(1);
  CHECK(first >= 0 && copy >= 0);
  struct pair p = pair();
  for (int fd = 0; fd < 3; fd++) CHECK(close(fd) == 0);
  struct pair q = pair(); /* takes their numbers */
  int low = (q.a < 3) + (q.b < 3);
  CHECK(send(q.a, "x", 1, 0) == 1 && recv(q.b, back, 1, 0) == 1);
  CHECK(send(p.a, "x", 1, 0) == 1 && recv(p.b, back, 1, 0) == 1);
  close_range(0, 2, 0);
  for (int fd = 0; fd < 3; fd++) CHECK(open("/dev/null", O_RDWR) == fd);
  check_new_pair();
  CHECK(dup2(copy, 1) == 1);
  TELL(low);
}

/* ---- urgent data ---- */

static void urgent(void) {
  struct pair p = pair();
  int on = 1, marked = 7;
  socklen_t length = sizeof on;
  TELL(ioctl(p.b, SIOCATMARK, &marked));
  TELL(marked);
  TELL(sockatmark(p.b));
  TELL(recv(p.b, back, 1, MSG_OOB | MSG_DONTWAIT));
  TELL(setsockopt(p.b, SOL_SOCKET, SO_OOBINLINE, &on, sizeof on));
  on = 7;
  TELL(getsockopt(p.b, SOL_SOCKET, SO_OOBINLINE, &on, &length));
  TELL(on);
  TELL(recv(p.b, back, 1, MSG_OOB | MSG_DONTWAIT));
  TELL(poll(&(struct pollfd){.fd = p.b, .events = POLLPRI}, 1, 0));
  printf("not as the kernel:\n");
  TELL(send(p.a, "u", 1, MSG_OOB));
  TELL(sendto(p.a, "u", 1, MSG_OOB, NULL, 0));
  TELL(with_message(true, p.a, &(struct iovec){"u", 1}, 1, MSG_OOB));
  TELL(poll(&(struct pollfd){.fd = p.b, .events = POLLPRI | POLLIN}, 1, 0));
  TELL(recv(p.b, back, 10, MSG_DONTWAIT));
}

int main(int argc, char **argv) {
  static const struct test_case cases[] = {
    CASE(closed_while_asleep), CASE(closed_while_accepting), CASE(closed_in_epoll), CASE(large_numbers), CASE(lingers),
    CASE(lingers_in_vain), CASE(many_pieces), CASE(many_messages), CASE(files), CASE(shared_port),
    CASE(ended_by_a_third), CASE(ended_in_a_race), CASE(many_sleepers), CASE(streams), CASE(over_stdio),
    CASE(all_closed), CASE(urgent),
  };
  return run_case(argc, argv, cases, sizeof cases / sizeof *cases);
}
