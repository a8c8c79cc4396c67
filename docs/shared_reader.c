/* Follows Sprint's ring in shared memory: shared_reader SOCKET [KEY]. docs/shared-memory.md explains every step.
 * Prints the server's answer, then "SEQUENCE EVENT HASH" for each record and "lost COUNT from SEQUENCE". x86-64. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

enum { MAGIC, LAYOUT, SLOTS, RECORD, INTENT = 8, TAIL = 16, HEADER = 192, SIZE = 192 };

static int failed(const char *what) { perror(what); return 1; }

int main(int argc, char **argv)
{
    struct sockaddr_un server = { .sun_family = AF_UNIX };
    if (argc < 2 || strlen(argv[1]) >= sizeof server.sun_path) return fputs("shared_reader SOCKET [KEY]\n", stderr), 2;
    memcpy(server.sun_path, argv[1], strlen(argv[1]));
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&server, sizeof server)) return failed(argv[1]);
    char answer[4096];
    int hello = snprintf(answer, sizeof answer, argc > 2 ? "{\"key\":\"%s\"}\n" : "{}\n", argc > 2 ? argv[2] : "");
    if (hello < 0 || hello >= (int)sizeof answer) return fputs("key too long\n", stderr), 2;
    (void)!send(sock, answer, (size_t)hello, MSG_NOSIGNAL); /* a full server has hung up by now, and said why */

    int descriptors[2]; /* the ring, and an epoll instance that is readable when the ring has grown */
    union { struct cmsghdr first; char bytes[CMSG_SPACE(sizeof descriptors)]; } control;
    struct iovec into = { answer, sizeof answer };
    struct msghdr message = { .msg_iov = &into, .msg_iovlen = 1, .msg_control = &control };
    message.msg_controllen = sizeof control;
    ssize_t length = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    if (length <= 0) return failed("answer");
    printf("%.*s", (int)length, answer);
    fflush(stdout);
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    if (!rights || rights->cmsg_type != SCM_RIGHTS || rights->cmsg_len != CMSG_LEN(sizeof descriptors)) return 3;
    memcpy(descriptors, CMSG_DATA(rights), sizeof descriptors);

    struct stat memory;
    if (fstat(descriptors[0], &memory) || memory.st_size < HEADER) return failed("memory");
    const char *base = mmap(NULL, (size_t)memory.st_size, PROT_READ, MAP_SHARED, descriptors[0], 0);
    if (base == MAP_FAILED) return failed("mmap");
    const _Atomic uint64_t *index = (const _Atomic uint64_t *)base;
    uint64_t slots = index[SLOTS];
    if (memcmp(base, "SPRRING1", 8) || index[LAYOUT] != 1 || index[RECORD] != SIZE || slots < 2
        || slots > ((uint64_t)memory.st_size - HEADER) / SIZE) return fputs("no ring of layout 1\n", stderr), 1;

    struct epoll_event event = { .events = EPOLLRDHUP }; /* the same instance shall tell when the server is gone */
    if (epoll_ctl(descriptors[1], EPOLL_CTL_ADD, sock, &event)) return failed("epoll_ctl");
    uint64_t next = atomic_load_explicit(&index[TAIL], memory_order_acquire) + 1;
    for (;;) {
        while (next <= atomic_load_explicit(&index[TAIL], memory_order_acquire)) {
            unsigned char record[SIZE];
            memcpy(record, base + HEADER + (next - 1) % slots * SIZE, SIZE);
            atomic_thread_fence(memory_order_acquire); /* first the copy, only then: was it overtaken? */
            uint64_t intent = atomic_load_explicit(&index[INTENT], memory_order_relaxed);
            if (intent - next >= slots) {
                uint64_t oldest = intent - slots + 1;
                printf("lost %" PRIu64 " from %" PRIu64 "\n", oldest - next, next);
                next = oldest;
                continue;
            }
            printf("%" PRIu64 " %u ", next++, record[24]);
            for (int at = 95; at >= 64; at--) printf("%02x", record[at]); /* the hash, in display order */
            putchar('\n');
        }
        fflush(stdout);
        if (epoll_wait(descriptors[1], &event, 1, -1) == 1 && event.events & (EPOLLRDHUP | EPOLLHUP)) return 0;
    }
}
