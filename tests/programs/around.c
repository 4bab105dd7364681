/* Ways around the C library's socket calls: files that name hosts and interfaces, and rings.  Prints what it finds. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct ring;
/* liburing's, which the program is not linked with: there when somebody stands in for it. */
int io_uring_queue_init(unsigned entries, struct ring *ring, unsigned flags) __attribute__((weak));

static void show(const char *way, int fd) {
  char part[4096];
  printf("== %s%s\n", way, fcntl(fd, F_GETFD) & FD_CLOEXEC ? " close-on-exec" : "");
  fflush(stdout);
  for (ssize_t length; (length = read(fd, part, sizeof part)) > 0;)
    if (write(1, part, (size_t)length) != length) _exit(1);
  close(fd);
}

static int files(const char *path) {
  show("open", open(path, O_RDONLY));
  show("openat", openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC));
  FILE *stream = fopen(path, "re");
  if (!stream) return 1;
  char line[256];
  printf("== fopen%s\n", fcntl(fileno(stream), F_GETFD) & FD_CLOEXEC ? " close-on-exec" : "");
  while (fgets(line, sizeof line, stream)) fputs(line, stdout);
  rewind(stream); /* and once more, as from a file */
  if (!fgets(line, sizeof line, stream)) return 1;
  fclose(stream);
  errno = 0;
  const char *volatile nowhere = (const char *)8;
  int bad = open(nowhere, O_RDONLY);
  printf("== %d %s\n", bad, strerror(errno));
  return 0;
}

static int rings(void) {
  char parameters[256] = { 0 };
  errno = 0;
  long ring = syscall(SYS_io_uring_setup, 8, parameters);
  printf("%ld %s\n", ring < 0 ? ring : 0, strerror(errno));
  if (io_uring_queue_init) printf("%s\n", strerror(-io_uring_queue_init(8, (struct ring *)parameters, 0)));
  return 0;
}

int main(int count, char **argument) {
  int begins_with = errno;
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (count == 2) return files(argument[1]);
  printf("%d\n", begins_with);
  return rings();
}
