/* A worker of a trimig.ProcessGuest in C: it writes its memory page after page, and can verify it. With "track".
 *
 *     cc -O2 -o worker worker.c && trimig run --guest worker:./worker --qmp unix:a.sock
 *
 * The protocol is on the page protocol/worker.md. Write n (from 1 on) fills page (n - 1) % pages with the number n.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, PACKET = 65536 };
static uint64_t *ram, pages, count;
static int control, running;

static void write_page(void) {
    uint64_t *page = ram + count % pages * WORDS;
    count++;
    for (int i = 0; i < WORDS; i++) page[i] = count;
}

static int is_whole(void) {
    for (uint64_t p = 0; p < pages; p++) {
        uint64_t last = p < count ? (count - 1 - p) / pages * pages + p + 1 : 0;
        for (int i = 0; i < WORDS; i++) if (ram[p * WORDS + i] != last) return 0;
    }
    return 1;
}

static int open_userfaultfd(unsigned long long features) {
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    return fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 ? fd : -1;
}

static void reply(const char *text, int fd) { /* fd: a descriptor to send with it, or -1 */
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } rights = {
        .header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec part = {.iov_base = (void *)text, .iov_len = strlen(text)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        memcpy(CMSG_DATA(&rights.header), &fd, sizeof fd);
        message.msg_control = &rights, message.msg_controllen = sizeof rights.room;
    }
    if (sendmsg(control, &message, MSG_NOSIGNAL) < 0) exit(0);
    if (fd >= 0) close(fd);
}

static void serve(char *packet) {
    char *body = strchr(packet, '\n') + 1, verb[32] = "", text[128], more[64] = "";
    unsigned long long number = 0, one = 0, two = 0;
    int fd = -1, ok = 1;
    sscanf(packet, "%llu %31s %llu %llu", &number, verb, &one, &two);
    if (!strcmp(verb, "hello")) strcpy(more, " 1 track");
    else if (!strcmp(verb, "ram")) {
        ram = mmap(NULL, two, PROT_READ | PROT_WRITE, MAP_SHARED, one, 0), pages = two / PAGE;
        ok = ram != MAP_FAILED, snprintf(more, sizeof more, " %llu", (unsigned long long)ram);
    } else if (!strcmp(verb, "track")) ok = (fd = open_userfaultfd(one)) >= 0;
    else if (!strcmp(verb, "pause")) running = 0;
    else if (!strcmp(verb, "resume")) running = 1;
    else if (!strcmp(verb, "save")) snprintf(more, sizeof more, "\n%llu", (unsigned long long)count);
    else if (!strcmp(verb, "load")) count = strtoull(body, NULL, 10);
    else if (!strcmp(verb, "x-verify")) ok = is_whole(), snprintf(more, sizeof more, " %llu", (unsigned long long)count);
    else ok = !strcmp(verb, "create") || !strcmp(verb, "ping") || !strcmp(verb, "quit");
    if (ok) snprintf(text, sizeof text, "%llu ok%s%s", number, more, strchr(more, '\n') ? "" : "\n");
    else snprintf(text, sizeof text, "%llu error\n%s failed", number, verb);
    reply(text, fd);
    if (!strcmp(verb, "quit")) exit(0);
}

int main(void) {
    static char packet[PACKET + 1];
    if (!getenv("TRIMIG_WORKER_SOCKET")) return fputs("trimig starts this program\n", stderr), 2;
    control = atoi(getenv("TRIMIG_WORKER_SOCKET"));
    for (;;) {
        struct pollfd ready = {.fd = control, .events = POLLIN};
        if (poll(&ready, 1, running ? 1 : -1) > 0) {
            ssize_t length = recv(control, packet, PACKET, 0);
            if (length <= 0) return 0; /* the host has ended */
            packet[length] = 0;
            serve(packet);
        }
        for (int i = 0; running && i < 8; i++) write_page();
    }
}
