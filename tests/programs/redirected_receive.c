/* recv into memory of the VMMC heap: a program linked to libvmmc whose sockets the preload library serves.
 *
 *   redirected_receive PORT CHUNK ROUNDS [ordinary [undumpable] | read-only | impatient]
 *
 * Accepts one connection and reads ROUNDS times CHUNK bytes, each with MSG_WAITALL at a place of its own
 * in a buffer from vmmc_alloc (or malloc, or a mapping that cannot be written, when told so); writes all of it to stdout.  Before each read it waits for
 * a byte on stdin, so that a test decides what has arrived by then.  Who is impatient takes its address back again and
 * again (SO_RCVTIMEO), and asks for the rest. */
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>
#include <vmmc.h>

static void die(const char *what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(1);
}

int main(int count, char **arguments) {
  if (count < 4) return 2;
  size_t chunk = strtoul(arguments[2], NULL, 10), rounds = strtoul(arguments[3], NULL, 10);
  struct vmmc_endpoint *here = vmmc_attach(NULL, VMMC_HERE);
  if (!here) die("attach");
  bool impatient = count > 4 && !strcmp(arguments[4], "impatient");
  char *memory = count == 4 || impatient ? vmmc_alloc(here, chunk * rounds) : malloc(chunk * rounds);
  if (count > 4 && !strcmp(arguments[4], "read-only"))
    memory = mmap(NULL, chunk * rounds, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (count > 5) prctl(PR_SET_DUMPABLE, 0);
  if (!memory) die("alloc");

  int listener = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[1]))};
  if (listener < 0 || bind(listener, (void *)&address, sizeof address) || listen(listener, 1)) die("listen");
  int peer = accept(listener, NULL, NULL);
  if (peer < 0) die("accept");
  struct timeval patience = {.tv_usec = 100};
  if (impatient && setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience)) die("SO_RCVTIMEO");
  for (size_t round = 0; round < rounds; round++) {
    char go;
    if (read(0, &go, 1) != 1) die("stdin");
    size_t got = 0;
    do {
      ssize_t n = recv(peer, memory + round * chunk + got, chunk - got, MSG_WAITALL);
      if (n > 0) got += (size_t)n;
      if (n == 0 || (n < 0 && !(impatient && errno == EAGAIN))) die("recv");
    } while (impatient && got < chunk);
    if (got != chunk) die("recv");
  }
  close(peer);
  for (size_t done = 0; done < chunk * rounds;) {
    ssize_t n = write(1, memory + done, chunk * rounds - done);
    if (n < 0) die("write");
    done += (size_t)n;
  }
  return 0;
}
