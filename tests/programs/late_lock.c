/* late_lock.c: a library to preload: whoever asks for a lock says so through a pipe ($LATE_SAY), and gets it when
 * another ($LATE_WAIT) is closed. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

static int late(int fd, int command, void *argument) {
  if (command == F_SETLK) {
    char nothing;
    if (write(atoi(getenv("LATE_SAY")), "!", 1) != 1) abort();
    while (read(atoi(getenv("LATE_WAIT")), &nothing, 1) < 0 && errno == EINTR) {
    }
  }
  int (*real)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl64");
  return real(fd, command, argument);
}

#define LATE(name)                                 \
  int name(int fd, int command, ...) {             \
    va_list arguments;                             \
    va_start(arguments, command);                  \
    void *argument = va_arg(arguments, void *);    \
    va_end(arguments);                             \
    return late(fd, command, argument);            \
  }

LATE(fcntl)
LATE(fcntl64)
