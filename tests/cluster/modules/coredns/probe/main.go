// probe: what the test cluster's own tests run in Pods, and what other tests use to look around from inside one.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

const usage = `probe serve PORT             answer TCP connections with the host's name until told to end
probe sleep                  do nothing until told to end
probe connect HOST:PORT      print what a TCP server says first; exit status 1 if there is no connection within 3 s
probe resolve NAME           print the addresses of a name
probe kernel                 print what the kernel says that it is, and its first messages
probe lines BYTES            print numbered lines of 100 bytes
probe write FILE TEXT        write a file
probe read FILE              print a file`

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		args = append(args, "", "")[:2]
	}
	switch args[0] {
	case "serve":
		return serve(args[1])
	case "sleep":
		waitForEnd()
		return nil
	case "connect":
		return connect(args[1])
	case "resolve":
		return resolve(args[1])
	case "kernel":
		return kernel()
	case "lines":
		return lines(args[1])
	case "write":
		return os.WriteFile(args[1], []byte(args[2]), 0o644)
	case "read":
		content, err := os.ReadFile(args[1])
		os.Stdout.Write(content)
		return err
	}
	return fmt.Errorf("usage:\n%s", usage)
}

func waitForEnd() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	<-end
}

func serve(port string) error {
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	name, _ := os.Hostname()
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				os.Exit(1)
			}
			fmt.Fprintln(connection, name)
			connection.Close()
		}
	}()
	waitForEnd()
	return nil
}

func connect(address string) error {
	connection, err := net.DialTimeout("tcp", address, 3*time.Second)
	if err != nil {
		return err
	}
	connection.SetReadDeadline(time.Now().Add(3 * time.Second))
	_, err = io.Copy(os.Stdout, connection)
	return err
}

func resolve(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(ctx, name)
	for _, address := range addresses {
		fmt.Println(address)
	}
	return err
}

func kernel() error {
	version, err := os.ReadFile("/proc/version")
	if err != nil {
		return err
	}
	messages := make([]byte, 4096)
	// Action 3 reads all; a kernel that lets nobody read them answers EPERM.
	n, err := syscall.Klogctl(3, messages)
	if err != nil {
		n = 0
	}
	fmt.Printf("%s%s\n", version, bytes.TrimSpace(messages[:n]))
	return nil
}

func lines(size string) error {
	bytesWanted, err := strconv.Atoi(size)
	if err != nil {
		return err
	}
	for number := 0; number < bytesWanted/100; number++ {
		fmt.Printf("%099d\n", number)
	}
	return nil
}
