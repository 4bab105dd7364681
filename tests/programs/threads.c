/*
 * Many threads, many connections, every byte checked.
 *
 *     threads CASE HOST PORT     an echo server listens there
 */
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/epoll.h>

#include "check.h"

enum { THREADS = 8, ROUNDS = 20, BLOCK = 50000, STREAM = 8 << 20 };
static const char *host, *port;

static unsigned char expected_at(uint64_t position, unsigned seed) {
  return (unsigned char)((position * 2654435761u + seed) >> 13);
}

static void fill(unsigned char *block, size_t length, uint64_t position, unsigned seed) {
  for (size_t i = 0; i < length; i++) block[i] = expected_at(position + i, seed);
}

static void start(pthread_t *thread, void *(*run)(void *), void *argument) {
  CHECK(pthread_create(thread, NULL, run, argument) == 0);
}

static void join(pthread_t thread) { CHECK(pthread_join(thread, NULL) == 0); }

/* ---- a connection a round in each thread ---- */

static void *open_and_close(void *argument) {
  unsigned seed = (unsigned)(uintptr_t)argument;
  unsigned char *block = malloc(BLOCK), *back = malloc(BLOCK);
  for (int round = 0; round < ROUNDS; round++) {
    int fd = connect_to(host, port);
    size_t length = 1 + (size_t)(seed * 7919 + (unsigned)round * 104729) % BLOCK;
    fill(block, length, (uint64_t)round << 20, seed);
    CHECK(send(fd, block, length, 0) == (ssize_t)length);
    CHECK(recv(fd, back, length, MSG_WAITALL) == (ssize_t)length);
    CHECK(memcmp(block, back, length) == 0);
    CHECK(close(fd) == 0);
  }
  free(block), free(back);
  return NULL;
}

static void many_connections(void) {
  pthread_t threads[THREADS];
  for (uintptr_t i = 0; i < THREADS; i++) start(&threads[i], open_and_close, (void *)i);
  for (int i = 0; i < THREADS; i++) join(threads[i]);
}

/* ---- one thread sends, another receives, on one connection ---- */

static void *send_stream(void *argument) {
  int fd = *(int *)argument;
  static unsigned char block[60000];
  for (uint64_t done = 0; done < STREAM;) {
    size_t length = 1 + done * 31 % sizeof block;
    if (length > STREAM - done) length = STREAM - done;
    fill(block, length, done, 1);
    for (size_t sent = 0; sent < length;) {
      ssize_t n = send(fd, block + sent, length - sent, 0);
      CHECK(n > 0);
      sent += (size_t)n;
    }
    done += length;
  }
  CHECK(shutdown(fd, SHUT_WR) == 0);
  return NULL;
}

static void *receive_stream(void *argument) {
  int fd = *(int *)argument;
  static unsigned char block[70000];
  uint64_t done = 0;
  ssize_t n;
  while ((n = recv(fd, block, 1 + done * 17 % sizeof block, 0)) > 0) {
    for (ssize_t i = 0; i < n; i++) CHECK(block[i] == expected_at(done + (uint64_t)i, 1));
    done += (uint64_t)n;
  }
  CHECK(n == 0);
  CHECK(done == STREAM);
  return NULL;
}

static void both_directions(void) {
  int fd = connect_to(host, port);
  pthread_t sender, receiver;
  start(&receiver, receive_stream, &fd);
  start(&sender, send_stream, &fd);
  join(sender), join(receiver);
  CHECK(close(fd) == 0);
}

/* ---- a listener on which several threads accept ---- */

struct listener {
  int fd;
  _Atomic int accepted;
};

static void *accept_some(void *argument) {
  struct listener *listener = argument;
  for (;;) {
    int fd = accept(listener->fd, NULL, NULL);
    CHECK(fd >= 0);
    char kind;
    CHECK(recv(fd, &kind, 1, 0) == 1);
    if (kind != 'q') listener->accepted++;
    CHECK(send(fd, &kind, 1, 0) == 1);
    char more;
    CHECK(recv(fd, &more, 1, 0) == 0);
    CHECK(close(fd) == 0);
    if (kind == 'q') return NULL;
  }
}

static void *connect_some(void *argument) {
  char *number = argument, byte;
  for (int i = 0; i < ROUNDS; i++) {
    int fd = connect_to("127.0.0.1", number);
    CHECK(send(fd, "x", 1, 0) == 1 && recv(fd, &byte, 1, 0) == 1 && byte == 'x');
    CHECK(close(fd) == 0);
  }
  return NULL;
}

static void accept_in_many_threads(void) {
  struct listener listener = {.fd = socket(AF_INET, SOCK_STREAM, 0)};
  struct sockaddr_in address = {.sin_family = AF_INET};
  socklen_t length = sizeof address;
  char number[8];
  CHECK(bind(listener.fd, (struct sockaddr *)&address, length) == 0 && listen(listener.fd, 16) == 0);
  CHECK(getsockname(listener.fd, (struct sockaddr *)&address, &length) == 0);
  snprintf(number, sizeof number, "%d", ntohs(address.sin_port));
  pthread_t servers[THREADS], clients[THREADS];
  for (int i = 0; i < THREADS; i++) start(&servers[i], accept_some, &listener);
  for (int i = 0; i < THREADS; i++) start(&clients[i], connect_some, number);
  for (int i = 0; i < THREADS; i++) join(clients[i]);
  CHECK(listener.accepted == THREADS * ROUNDS);
  for (int i = 0; i < THREADS; i++) {
    int fd = connect_to("127.0.0.1", number);
    char byte;
    CHECK(send(fd, "q", 1, 0) == 1 && recv(fd, &byte, 1, 0) == 1);
    CHECK(close(fd) == 0);
  }
  for (int i = 0; i < THREADS; i++) join(servers[i]);
}

/* ---- several threads in epoll_wait on one set ---- */

struct served {
  int set, finish; /* the epoll set; a pipe's end that becomes readable when all is over */
  _Atomic int echoes;
};

static void *serve_from_set(void *argument) {
  struct served *served = argument;
  for (;;) {
    struct epoll_event event;
    CHECK(epoll_wait(served->set, &event, 1, -1) == 1);
    if (event.data.fd == served->finish) return NULL;
    char byte;
    CHECK(recv(event.data.fd, &byte, 1, 0) == 1);
    served->echoes++;
    CHECK(send(event.data.fd, &byte, 1, 0) == 1); /* comes back from the echo server */
    event.events = EPOLLIN | EPOLLONESHOT;
    CHECK(epoll_ctl(served->set, EPOLL_CTL_MOD, event.data.fd, &event) == 0);
    if (served->echoes >= THREADS * ROUNDS) {
      ssize_t written = write(served->finish + 1, "", 1); /* read end and write end are neighbours */
      CHECK(written == 1);
    }
  }
}

static void epoll_in_many_threads(void) {
  int ends[2], fds[THREADS];
  CHECK(pipe(ends) == 0 && ends[1] == ends[0] + 1);
  struct served served = {.set = epoll_create1(0), .finish = ends[0]};
  struct epoll_event event = {.events = EPOLLIN, .data.fd = ends[0]};
  CHECK(epoll_ctl(served.set, EPOLL_CTL_ADD, ends[0], &event) == 0);
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; i++) start(&threads[i], serve_from_set, &served);
  for (int i = 0; i < THREADS; i++) {
    fds[i] = connect_to(host, port);
    event = (struct epoll_event){.events = EPOLLIN | EPOLLONESHOT, .data.fd = fds[i]};
    CHECK(epoll_ctl(served.set, EPOLL_CTL_ADD, fds[i], &event) == 0);
    CHECK(send(fds[i], "x", 1, 0) == 1);
  }
  for (int i = 0; i < THREADS; i++) join(threads[i]);
  CHECK(served.echoes >= THREADS * ROUNDS);
  for (int i = 0; i < THREADS; i++) CHECK(close(fds[i]) == 0);
}

/* ---- shutdown in one thread ends a receive in another ---- */

static void *receive_to_the_end(void *argument) {
  char byte;
  CHECK(recv(*(int *)argument, &byte, 1, 0) == 0);
  return NULL;
}

static void shutdown_wakes_a_receiver(void) {
  for (int round = 0; round < ROUNDS; round++) {
    int fd = connect_to(host, port);
    pthread_t receiver;
    start(&receiver, receive_to_the_end, &fd);
    CHECK(shutdown(fd, SHUT_RDWR) == 0);
    join(receiver);
    CHECK(close(fd) == 0);
  }
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    void (*run)(void);
  } cases[] = {
#define CASE(name) {#name, name}
    CASE(many_connections), CASE(both_directions), CASE(accept_in_many_threads), CASE(epoll_in_many_threads),
    CASE(shutdown_wakes_a_receiver),
  };
  if (argc != 4) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) puts(cases[i].name);
    return argc > 1;
  }
  host = argv[2], port = argv[3];
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (!strcmp(argv[1], cases[i].name)) {
      cases[i].run();
      return 0;
    }
  }
  fprintf(stderr, "no case %s\n", argv[1]);
  return 2;
}
