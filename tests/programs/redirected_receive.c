/* recv into memory of the VMMC heap: a program linked to libvmmc whose sockets the preload library serves.
 *
 *   redirected_receive PORT CHUNK ROUNDS [ordinary [undumpable] | read-only]
 *
 * Accepts one connection and reads ROUNDS times CHUNK bytes, each with MSG_WAITALL at a place of its own
 * in a buffer from vmmc_alloc (or malloc, or a mapping that cannot be written, when told so); writes all of it to stdout.  Before each read it waits for
 * a byte on stdin, so that a test decides what has arrived by then. */
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
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
  char *memory = count == 4 ? vmmc_alloc(here, chunk * rounds) : malloc(chunk * rounds);
  if (count > 4 && !strcmp(arguments[4], "read-only"))
    memory = mmap(NULL, chunk * rounds, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (count > 5) prctl(PR_SET_DUMPABLE, 0);
  if (!memory) die("alloc");

  int listener = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[1]))};
  if (listener < 0 || bind(listener, (void *)&address, sizeof address) || listen(listener, 1)) die("listen");
  int peer = accept(listener, NULL, NULL);
  if (peer < 0) die("accept");
  for (size_t round = 0; round < rounds; round++) {
    char go;
    if (read(0, &go, 1) != 1) die("stdin");
    ssize_t got = recv(peer, memory + round * chunk, chunk, MSG_WAITALL);
    if (got != (ssize_t)chunk) die("recv");
  }
  close(peer);
  for (size_t done = 0; done < chunk * rounds;) {
    ssize_t n = write(1, memory + done, chunk * rounds - done);
    if (n < 0) die("write");
    done += (size_t)n;
  }
  return 0;
}
