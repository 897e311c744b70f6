/* Runs C kernels for tests in a process of its own, which an emulator may be running: `server FILE`.
 *
 * A line on standard input names a kernel, then for its plan and each of its arrays the first byte in FILE, at the beginning
 * of a page, and the number of bytes (-1 0 is NULL). The answer is a line with the kernel's status. Each array ends where a
 * page begins that may not be touched, so that an access past it ends the process. `threads N` sets the number of threads. */
#define _GNU_SOURCE
#include "hotloops.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, MAX = 16 };

/* A call may pass more arguments than the function reads. */
typedef int (*kernel)(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                      void *, void *, void *, void *);

static void fail(const char *what)
{
    perror(what);
    exit(2);
}

/* One array between two guarded pages. */
typedef struct {
    char *map, *start;
    size_t room;
} guarded;

static guarded place(int file, long long begin, long long bytes)
{
    guarded g = {.room = ((size_t)bytes + PAGE - 1) / PAGE * PAGE};
    if (begin < 0) return g;
    g.map = mmap(NULL, g.room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (g.map == MAP_FAILED) fail("mmap");
    g.start = g.map + PAGE + (g.room - (size_t)bytes);
    if (g.room && mmap(g.map + PAGE, g.room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, begin) == MAP_FAILED)
        fail("mmap of the file");
    return g;
}

int main(int count, char **arguments)
{
    if (count != 2) return 2;
    int file = open(arguments[1], O_RDWR);
    if (file < 0) fail(arguments[1]);
    char line[1024], name[128];
    while (fgets(line, sizeof line, stdin)) {
        int at = 0, more, arrays = 0, status = -1;
        sscanf(line, "%127s%n", name, &at);
        if (!strcmp(name, "threads")) {
            status = hl_num_threads(atoi(line + at));
        } else {
            guarded g[MAX] = {{0}};
            long long begin, bytes;
            for (; arrays < MAX && sscanf(line + at, "%lld %lld%n", &begin, &bytes, &more) == 2; at += more)
                g[arrays++] = place(file, begin, bytes);
            kernel run = (kernel)dlsym(RTLD_DEFAULT, name);
            if (!run) fail(name);
            void *p[MAX];
            for (int i = 0; i < MAX; i++) p[i] = g[i].start;
            status = run(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14],
                         p[15]);
            for (int i = 0; i < arrays; i++)
                if (g[i].map) munmap(g[i].map, g[i].room + 2 * PAGE);
        }
        printf("%d\n", status);
        fflush(stdout);
    }
    return 0;
}
