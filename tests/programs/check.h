/* check.h: how test programs say what is wrong: file, line, what was expected, errno; then they end with 1. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(holds)                                                                                  \
  do {                                                                                                \
    errno = 0;                                                                                        \
    if (!(holds)) {                                                                                   \
      fprintf(stderr, "%s:%d: %s does not hold (pid %d, %s)\n", __FILE__, __LINE__, #holds, getpid(), \
              strerror(errno));                                                                       \
      _exit(1);                                                                                       \
    }                                                                                                 \
  } while (0)

/* The call fails, with that errno. */
#define CHECK_FAILS(call, code)                                                                           \
  do {                                                                                                    \
    errno = 0;                                                                                            \
    long result_ = (long)(call);                                                                          \
    if (result_ != -1 || errno != (code)) {                                                               \
      fprintf(stderr, "%s:%d: %s returned %ld, %s; expected %s (pid %d)\n", __FILE__, __LINE__, #call,    \
              result_, strerrorname_np(errno), #code, getpid());                                          \
      _exit(1);                                                                                           \
    }                                                                                                     \
  } while (0)

static inline int connect_to(const char *host, const char *port) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_family = AF_INET}, *found;
  CHECK(getaddrinfo(host, port, &hints, &found) == 0);
  int fd = socket(found->ai_family, found->ai_socktype, 0);
  CHECK(fd >= 0);
  CHECK(connect(fd, found->ai_addr, found->ai_addrlen) == 0);
  freeaddrinfo(found);
  return fd;
}

/* Sends a text over a connection to an echo server and expects it back. */
static inline void check_echo(int fd, const char *text) {
  char back[256];
  size_t length = strlen(text), got = 0;
  CHECK(send(fd, text, length, 0) == (ssize_t)length);
  while (got < length) {
    ssize_t n = recv(fd, back + got, sizeof back - got, 0);
    CHECK(n > 0);
    got += (size_t)n;
  }
  CHECK(got == length && memcmp(back, text, length) == 0);
}

/* Waits for a child and expects it to have ended with status 0. */
static inline void check_child(pid_t child) {
  int status;
  CHECK(child > 0);
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

#endif
