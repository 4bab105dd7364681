/*
 * What socket calls answer when something is wrong, case by case, as Linux TCP answers it.
 *
 *     errors CASE HOST PORT     an echo server listens there
 *
 * The same program runs over the kernel, which proves that what it expects is right.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/time.h>
#include <time.h>

#include "check.h"

static const char *host, *port;
static volatile sig_atomic_t broken_pipes;

static void count_broken_pipe(int number) {
  (void)number;
  broken_pipes++;
}

static int new_socket(void) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(fd >= 0);
  return fd;
}

static struct sockaddr_in address_of(const char *name, const char *service) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_family = AF_INET}, *found;
  CHECK(getaddrinfo(name, service, &hints, &found) == 0);
  struct sockaddr_in address = *(struct sockaddr_in *)found->ai_addr;
  freeaddrinfo(found);
  return address;
}

static int connect_at(int fd, struct sockaddr_in address) {
  return connect(fd, (struct sockaddr *)&address, sizeof address);
}

static int bind_at(int fd, struct sockaddr_in address) {
  return bind(fd, (struct sockaddr *)&address, sizeof address);
}

static struct sockaddr_in name_of(int fd) {
  struct sockaddr_in address;
  socklen_t length = sizeof address;
  CHECK(getsockname(fd, (struct sockaddr *)&address, &length) == 0);
  return address;
}

static int error_of(int fd) {
  int error = -1;
  socklen_t length = sizeof error;
  CHECK(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && length == sizeof error);
  return error;
}

static short polled(int fd, short events, int timeout_ms) {
  struct pollfd watched = {.fd = fd, .events = events};
  CHECK(poll(&watched, 1, timeout_ms) >= 0);
  return watched.revents;
}

static void not_blocking(int fd) { CHECK(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0); }

/* A connection of this process to itself: both ends. */
static void connected_pair(int ends[2]) {
  int listener = new_socket();
  CHECK(bind_at(listener, (struct sockaddr_in){.sin_family = AF_INET}) == 0 && listen(listener, 4) == 0);
  struct sockaddr_in address = name_of(listener);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ends[0] = new_socket();
  CHECK(connect_at(ends[0], address) == 0);
  ends[1] = accept(listener, NULL, NULL);
  CHECK(ends[1] >= 0);
  CHECK(close(listener) == 0);
}

/* A port of the other host where nobody listens. */
static struct sockaddr_in nobody(void) { return address_of(host, "9"); }

static void refused(void) {
  int fd = new_socket();
  CHECK_FAILS(connect_at(fd, nobody()), ECONNREFUSED);
  CHECK(error_of(fd) == 0);
  /* The socket can be used again. */
  CHECK(connect_at(fd, address_of(host, port)) == 0);
  check_echo(fd, "after a refusal");
}

static void refused_later(void) {
  int fd = new_socket();
  not_blocking(fd);
  CHECK_FAILS(connect_at(fd, nobody()), EINPROGRESS);
  CHECK(polled(fd, POLLOUT, 5000) == (POLLOUT | POLLERR | POLLHUP));
  CHECK(error_of(fd) == ECONNREFUSED);
  CHECK(error_of(fd) == 0);
}

static void in_progress(void) {
  int fd = new_socket();
  not_blocking(fd);
  CHECK_FAILS(connect_at(fd, address_of(host, port)), EINPROGRESS);
  CHECK(polled(fd, POLLOUT, 5000) == POLLOUT);
  CHECK(error_of(fd) == 0);
  CHECK(connect_at(fd, address_of(host, port)) == 0); /* tells once that it worked */
  CHECK_FAILS(connect_at(fd, address_of(host, port)), EISCONN);
}

static void is_connected(void) {
  int fd = connect_to(host, port);
  CHECK_FAILS(connect_at(fd, address_of(host, port)), EISCONN);
  check_echo(fd, "still");
}

static void not_connected(void) {
  int fd = new_socket();
  char byte = 'x';
  struct sockaddr_in address;
  socklen_t length = sizeof address;
  CHECK_FAILS(recv(fd, &byte, 1, 0), ENOTCONN);
  CHECK_FAILS(read(fd, &byte, 1), ENOTCONN);
  CHECK_FAILS(getpeername(fd, (struct sockaddr *)&address, &length), ENOTCONN);
  CHECK_FAILS(shutdown(fd, SHUT_RDWR), ENOTCONN);
  CHECK_FAILS(send(fd, &byte, 1, 0), EPIPE);
  CHECK(broken_pipes == 1);
  CHECK_FAILS(accept(fd, NULL, NULL), EINVAL);
}

static void broken_pipe(void) {
  int ends[2];
  connected_pair(ends);
  CHECK(close(ends[1]) == 0);
  CHECK(polled(ends[0], POLLIN, 5000) & POLLIN);
  char byte = 'x';
  CHECK(recv(ends[0], &byte, 1, 0) == 0);
  /* The first send may still be taken; its answer breaks the pipe. */
  ssize_t sent;
  do sent = send(ends[0], &byte, 1, MSG_NOSIGNAL);
  while (sent == 1);
  CHECK(sent == -1);
  CHECK(broken_pipes == 0);
  CHECK_FAILS(send(ends[0], &byte, 1, MSG_NOSIGNAL), EPIPE);
  CHECK(broken_pipes == 0);
  CHECK_FAILS(send(ends[0], &byte, 1, 0), EPIPE);
  CHECK(broken_pipes == 1);
  CHECK_FAILS(write(ends[0], &byte, 1), EPIPE);
  CHECK(broken_pipes == 2);
}

static void own_end_shut(void) {
  int ends[2];
  connected_pair(ends);
  CHECK(shutdown(ends[0], SHUT_WR) == 0);
  CHECK_FAILS(send(ends[0], "x", 1, MSG_NOSIGNAL), EPIPE);
  char byte;
  CHECK(recv(ends[1], &byte, 1, 0) == 0);
  /* The other direction lives. */
  CHECK(send(ends[1], "y", 1, 0) == 1);
  CHECK(recv(ends[0], &byte, 1, 0) == 1 && byte == 'y');
}

static void reset_by_peer(void) {
  int ends[2];
  connected_pair(ends);
  CHECK(send(ends[0], "unread", 6, 0) == 6);
  CHECK(polled(ends[1], POLLIN, 5000) == POLLIN);
  CHECK(close(ends[1]) == 0); /* with data unread: a reset */
  CHECK(polled(ends[0], POLLIN, 5000) & POLLERR);
  char byte;
  CHECK_FAILS(recv(ends[0], &byte, 1, 0), ECONNRESET);
  CHECK(recv(ends[0], &byte, 1, 0) == 0);
}

static void reset_by_linger(void) {
  int ends[2];
  connected_pair(ends);
  struct linger linger = {.l_onoff = 1, .l_linger = 0};
  CHECK(setsockopt(ends[1], SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
  CHECK(close(ends[1]) == 0);
  CHECK(polled(ends[0], POLLIN, 5000) & POLLERR);
  char byte;
  CHECK_FAILS(recv(ends[0], &byte, 1, 0), ECONNRESET);
}

static void address_in_use(void) {
  int first = new_socket(), second = new_socket();
  CHECK(bind_at(first, (struct sockaddr_in){.sin_family = AF_INET}) == 0);
  CHECK_FAILS(bind_at(second, name_of(first)), EADDRINUSE);
  CHECK(listen(first, 1) == 0);
  CHECK_FAILS(bind_at(second, name_of(first)), EADDRINUSE);
  /* SO_REUSEADDR does not share a port that is listened on. */
  int one = 1;
  CHECK(setsockopt(second, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0);
  CHECK_FAILS(bind_at(second, name_of(first)), EADDRINUSE);
  struct sockaddr_in address = name_of(first);
  CHECK(close(first) == 0);
  CHECK(bind_at(second, address) == 0);
  CHECK_FAILS(bind_at(second, address), EINVAL);
}

static void address_of_nobody(void) {
  int fd = new_socket();
  struct sockaddr_in address = {.sin_family = AF_INET};
  CHECK(inet_pton(AF_INET, "192.0.2.1", &address.sin_addr) == 1);
  CHECK_FAILS(bind_at(fd, address), EADDRNOTAVAIL);
}

static void would_block(void) {
  int ends[2], listener = new_socket();
  connected_pair(ends);
  char byte;
  CHECK_FAILS(recv(ends[0], &byte, 1, MSG_DONTWAIT), EAGAIN);
  not_blocking(ends[0]);
  CHECK_FAILS(read(ends[0], &byte, 1), EAGAIN);
  static char block[1 << 20];
  ssize_t sent;
  size_t total = 0;
  do sent = send(ends[0], block, sizeof block, 0), total += sent > 0 ? (size_t)sent : 0;
  while (sent > 0);
  CHECK(sent == -1 && total > 0);
  CHECK_FAILS(send(ends[0], block, 1, 0), EAGAIN);
  CHECK(polled(ends[0], POLLOUT, 0) == 0);
  CHECK(listen(listener, 1) == 0);
  not_blocking(listener);
  CHECK_FAILS(accept(listener, NULL, NULL), EAGAIN);
}

static void timeouts(void) {
  int ends[2];
  connected_pair(ends);
  struct timeval limit = {.tv_usec = 50000};
  CHECK(setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == 0);
  CHECK(setsockopt(ends[0], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) == 0);
  struct timespec before, after;
  char byte;
  clock_gettime(CLOCK_MONOTONIC, &before);
  CHECK_FAILS(recv(ends[0], &byte, 1, 0), EAGAIN);
  clock_gettime(CLOCK_MONOTONIC, &after);
  CHECK((after.tv_sec - before.tv_sec) * 1000000000L + after.tv_nsec - before.tv_nsec >= 45000000L);
  static char block[1 << 20];
  ssize_t sent;
  do sent = send(ends[0], block, sizeof block, 0);
  while (sent > 0);
  CHECK_FAILS(send(ends[0], block, 1, 0), EAGAIN);
}

static void wrong_kind(void) {
  int ends[2], fd = new_socket();
  connected_pair(ends);
  CHECK_FAILS(listen(ends[0], 1), EINVAL);
  CHECK(listen(fd, 1) == 0);
  CHECK_FAILS(connect_at(fd, address_of(host, port)), EISCONN);
  CHECK_FAILS(recv(fd, &fd, 1, 0), ENOTCONN);
  int value;
  CHECK_FAILS(setsockopt(ends[0], SOL_SOCKET, SO_REUSEADDR, &value, 1), EINVAL);
  CHECK_FAILS(lseek(ends[0], 0, SEEK_CUR), ESPIPE);
}

static void closed_descriptor(void) {
  int ends[2];
  connected_pair(ends);
  CHECK(close(ends[0]) == 0);
  char byte;
  CHECK_FAILS(close(ends[0]), EBADF);
  CHECK_FAILS(recv(ends[0], &byte, 1, 0), EBADF);
  CHECK_FAILS(send(ends[0], &byte, 1, 0), EBADF);
  CHECK_FAILS(connect_at(ends[0], nobody()), EBADF);
  CHECK(recv(ends[1], &byte, 1, 0) == 0);
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    void (*run)(void);
  } cases[] = {
#define CASE(name) {#name, name}
    CASE(refused), CASE(refused_later), CASE(in_progress), CASE(is_connected), CASE(not_connected), CASE(broken_pipe),
    CASE(own_end_shut), CASE(reset_by_peer), CASE(reset_by_linger), CASE(address_in_use), CASE(address_of_nobody),
    CASE(would_block), CASE(timeouts), CASE(wrong_kind), CASE(closed_descriptor),
  };
  if (argc != 4) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) puts(cases[i].name);
    return argc > 1;
  }
  host = argv[2], port = argv[3];
  signal(SIGPIPE, count_broken_pipe);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (!strcmp(argv[1], cases[i].name)) {
      cases[i].run();
      return 0;
    }
  }
  fprintf(stderr, "no case %s\n", argv[1]);
  return 2;
}
