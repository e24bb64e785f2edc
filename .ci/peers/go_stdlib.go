// Go's net/http: line by line, each payload checked to be JSON, each event flushed.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"log"
	"net/http"
	"os"
)

type chunk struct {
	Choices []struct {
		Delta struct{ Content string }
	}
}

var client = http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 10000}}

func stream(w http.ResponseWriter, r *http.Request) {
	url := os.Getenv("OPENAI_BASE_URL") + "/chat/completions"
	request, err := http.NewRequestWithContext(r.Context(), "POST", url, r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	request.ContentLength = r.ContentLength
	request.Header.Set("Content-Type", "application/json")
	upstream, err := client.Do(request)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer upstream.Body.Close()

	w.Header().Set("Content-Type", "text/event-stream")
	controller := http.NewResponseController(w)
	lines := bufio.NewScanner(upstream.Body)
	for lines.Scan() {
		payload, isData := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !isData {
			continue
		}
		if !bytes.Equal(payload, []byte("[DONE]")) {
			var parsed chunk
			if json.Unmarshal(payload, &parsed) != nil {
				return
			}
		}
		w.Write(lines.Bytes())
		w.Write([]byte("\n\n"))
		controller.Flush()
	}
}

func main() {
	http.HandleFunc("POST /stream", stream)
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}
