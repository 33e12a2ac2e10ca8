/* Takes a TDREPORT through /dev/tdx_guest, with the report data 0, 1, 2, ..., and prints it in hex. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>

/* Linux, Documentation/ABI of /dev/tdx_guest: newer than the headers of many systems. */
#define TDX_REPORTDATA_LEN 64
#define TDX_REPORT_LEN 1024
struct tdx_report_req {
	uint8_t reportdata[TDX_REPORTDATA_LEN];
	uint8_t tdreport[TDX_REPORT_LEN];
};
#define TDX_CMD_GET_REPORT0 _IOWR('T', 1, struct tdx_report_req)

int main(void)
{
	static struct tdx_report_req request;
	int fd = open("/dev/tdx_guest", O_RDWR | O_SYNC);

	for (int i = 0; i < TDX_REPORTDATA_LEN; i++)
		request.reportdata[i] = i;
	if (fd < 0 || ioctl(fd, TDX_CMD_GET_REPORT0, &request)) {
		perror("tdx_guest");
		return 1;
	}
	for (int i = 0; i < TDX_REPORT_LEN; i++)
		printf("%02x", request.tdreport[i]);
	printf("\n");
	return 0;
}
