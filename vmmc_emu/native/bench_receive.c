/*
 * bench_receive.c: the receiving side of vmmc-bench's `stream` and `asked`, into memory of a kind that is chosen.
 *
 *     vmmc-bench-receive heap|own BYTES     serves until it is killed; BYTES a receive
 *
 * heap: memory of vmmc_alloc, which the NIC reaches: a receive that waits has posted its address, and the
 * bytes go straight there.  own: memory of malloc, into which the library copies.  All else is the same.
 * To `asked` it says a byte before each receive, so that the answer finds the receive posted.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vmmc.h"

enum { ASKED = 3 }; /* vmmc-bench says first, in network order: what kind of conversation, and a size */

static void fail(const char *what) {
  fprintf(stderr, "vmmc-bench-receive: %s: %s\n", what, strerror(errno));
  exit(1);
}

static void serve(int fd, char *block, size_t size) {
  uint32_t opening[2];
  if (recv(fd, opening, sizeof opening, MSG_WAITALL) != sizeof opening) return;
  bool asks = ntohl(opening[0]) == ASKED;
  uint64_t total = 0;
  ssize_t n;
  while ((!asks || send(fd, "", 1, MSG_NOSIGNAL) == 1) && (n = recv(fd, block, size, MSG_WAITALL)) > 0) total += (uint64_t)n;
  if (n < 0) fail("recv");
  if (send(fd, &total, sizeof total, MSG_NOSIGNAL) != sizeof total) fail("send");
}

int main(int argc, char **argv) {
  if (argc != 3 || (strcmp(argv[1], "heap") && strcmp(argv[1], "own")) || atol(argv[2]) < 1) {
    fprintf(stderr, "usage: vmmc-bench-receive heap|own BYTES\n");
    return 2;
  }
  size_t size = (size_t)atol(argv[2]);
  char *block;
  if (argv[1][0] == 'h') {
    struct vmmc_endpoint *endpoint = vmmc_attach(NULL, VMMC_HERE);
    if (!endpoint) fail("cannot attach to a node");
    block = vmmc_alloc(endpoint, size);
  } else {
    block = malloc(size);
  }
  if (!block) fail("cannot allocate");
  memset(block, 1, size); /* its pages are there before anything is measured */

  struct sockaddr_in address = {.sin_family = AF_INET};
  socklen_t length = sizeof address;
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  if (listener < 0 || bind(listener, (struct sockaddr *)&address, length) < 0 || listen(listener, 16) < 0)
    fail("listen");
  if (getsockname(listener, (struct sockaddr *)&address, &length) < 0) fail("getsockname");
  printf("listening %d\n", ntohs(address.sin_port));
  fflush(stdout);
  for (;;) {
    int fd = accept(listener, NULL, NULL);
    if (fd < 0) fail("accept");
    serve(fd, block, size);
    close(fd);
  }
}
