// Package s3 is the shared store: one bucket in which the mirrors of a fleet keep blobs, and signed
// records of what tags name and of who may read what. It hides Amazon's SDK, the bucket's clock, its
// compare-and-swap, and the gates that keep a sick bucket from costing anybody more than one wait.
//
// Nothing that comes from the bucket is believed: blobs are for the caller to hash, records are
// signed with the fleet's key, and times are corrected by the bucket's own clock.
package s3

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/logging"
)

// What keeps a bucket from being used.
var (
	ErrOut      = errors.New("the shared store is out")
	ErrHeld     = errors.New("somebody else holds the lease")
	ErrClock    = errors.New("the clock is wrong")
	ErrReadOnly = errors.New("this host publishes nothing")
	errClosed   = errors.New("the shared store is closed")
)

// How many requests go on at a time, and how many downloads, each with all of its ranges.
const (
	maxReads  = 128
	maxBodies = 128
	maxWrites = 16
)

// minKey is the shortest key, in bytes, that signs anything.
const minKey = 16

// Config says which bucket, and how it is used.
type Config struct {
	Bucket     string
	Prefix     string       // of the names of all objects; "" or ending in a slash
	Region     string       // "" is us-east-1 where there is an Endpoint
	Endpoint   string       // URL of an S3-compatible store; "" is Amazon's
	PathStyle  bool         // the bucket's name is in the path and not in the host's name
	Encryption string       // on the server's side: "", "AES256" or "aws:kms"
	KMSKey     string       // of "aws:kms"; "" is the account's own
	Keys       [][]byte     // the fleet's, of at least 16 bytes: the first signs, all verify
	ReadOnly   bool         // publishes nothing
	Logger     *slog.Logger // nil discards
}

var (
	bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	prefixName = regexp.MustCompile(`^([A-Za-z0-9!_.*'()=@-]+/)*$`)
)

// check returns all that is wrong, and sets what has a default.
func (c *Config) check() error {
	var problems []error
	wrong := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if !bucketName.MatchString(c.Bucket) {
		wrong("bucket %q is not the name of a bucket", c.Bucket)
	}
	if !prefixName.MatchString(c.Prefix) {
		wrong("prefix %q is not one of names that end in a slash each", c.Prefix)
	}
	if c.Endpoint != "" {
		u, err := url.Parse(c.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
			wrong("endpoint %q is not a URL of a scheme and a host", c.Endpoint)
		}
		if c.Region == "" {
			c.Region = "us-east-1"
		}
	}
	if c.Region == "" {
		wrong("region is missing")
	}
	switch types.ServerSideEncryption(c.Encryption) {
	case "", types.ServerSideEncryptionAes256, types.ServerSideEncryptionAwsKms:
	default:
		wrong("encryption %q is neither AES256 nor aws:kms", c.Encryption)
	}
	if c.KMSKey != "" && c.Encryption != string(types.ServerSideEncryptionAwsKms) {
		wrong("a KMS key is for the encryption aws:kms")
	}
	if len(c.Keys) == 0 {
		wrong("the fleet's key is missing")
	}
	for i, key := range c.Keys {
		if len(key) < minKey {
			wrong("key %d has %d bytes, fewer than %d", i+1, len(key), minKey)
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return errors.Join(problems...)
}

// Bucket is the shared store. Its methods may be called by many goroutines at once.
type Bucket struct {
	cfg     Config
	log     *slog.Logger
	client  *s3.Client
	wire    *wire
	clock   *clock
	keys    keyring
	reads   *gate
	writes  *gate
	bodies  chan struct{} // of blobs that are on their way: they take no turn from what is small
	tags    *tagMemory
	wrong   *distrusted
	misread *distrusted // whose records may be wrong
	chunks  buffers     // of ranges that are read ahead
	parts   buffers     // of multipart uploads

	stop  context.CancelFunc
	ctx   context.Context // of all that goes on by itself, until stop
	mu    sync.Mutex      // guards tasks against a Wait before an Add
	tasks sync.WaitGroup
}

// New checks the configuration, and joins all that is wrong with it. It asks nobody anything:
// credentials are looked for, in the places where the SDK looks, when they are needed.
func New(cfg Config) (*Bucket, error) {
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: headerLimit}).DialContext,
		TLSHandshakeTimeout:   headerLimit,
		DisableCompression:    true,
		MaxIdleConns:          maxWrites,
		MaxIdleConnsPerHost:   maxWrites,
		IdleConnTimeout:       time.Minute,
		ExpectContinueTimeout: time.Second,
	}
	return newBucket(cfg, transport)
}

// newBucket is New with the way to the bucket.
func newBucket(cfg Config, transport http.RoundTripper) (*Bucket, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("shared store: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	b := &Bucket{
		cfg:     cfg,
		log:     cfg.Logger.With("bucket", cfg.Bucket),
		clock:   &clock{},
		keys:    newKeyring(cfg.Keys),
		tags:    newTagMemory(tagEntries),
		wrong:   &distrusted{},
		misread: &distrusted{},
		chunks:  newBuffers(readAhead, rangeSize),
		parts:   newBuffers(maxParts, partSize),
		bodies:  make(chan struct{}, maxBodies),
		ctx:     ctx,
		stop:    stop,
	}
	b.wire = &wire{next: transport, clock: b.clock}
	b.reads = b.newGate("reads", maxReads, b.probeReads)
	b.writes = b.newGate("writes", maxWrites, b.probeWrites)
	options := s3.Options{
		Region:                     cfg.Region,
		UsePathStyle:               cfg.PathStyle,
		Credentials:                aws.NewCredentialsCache(&chain{ctx: ctx, region: cfg.Region}),
		HTTPClient:                 &http.Client{Transport: b.wire, CheckRedirect: noRedirect},
		Retryer:                    aws.NopRetryer{}, // the second try of a read is the upstream
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
		Logger:                     logging.Nop{},
	}
	if cfg.Endpoint != "" {
		options.BaseEndpoint = &cfg.Endpoint
	}
	b.client = s3.New(options)
	return b, nil
}

// noRedirect since a request is signed for one host.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// Close ends all that the bucket does by itself, waits for it, and closes the connections. Requests
// that are under way fail.
func (b *Bucket) Close() {
	b.mu.Lock() // who has seen that it is not stopped has added itself by then
	b.stop()
	b.mu.Unlock()
	b.tasks.Wait()
	b.wire.close()
}

// start runs f in a goroutine that Close waits for. It returns false after Close.
func (b *Bucket) start(f func(context.Context)) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx.Err() != nil {
		return false
	}
	b.tasks.Go(func() { f(b.ctx) })
	return true
}

// encryption is for requests that store something.
func (b *Bucket) encryption() (types.ServerSideEncryption, *string) {
	if b.cfg.KMSKey == "" {
		return types.ServerSideEncryption(b.cfg.Encryption), nil
	}
	return types.ServerSideEncryption(b.cfg.Encryption), &b.cfg.KMSKey
}

// key is an object's whole name.
func (b *Bucket) key(name string) *string { return aws.String(b.cfg.Prefix + name) }

// writable says why nothing can be published now.
func (b *Bucket) writable() error {
	if b.cfg.ReadOnly {
		return ErrReadOnly
	}
	return b.writes.refusal()
}
